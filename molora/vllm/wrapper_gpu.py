"""The gated arithmetic on a GPU: a file of its own, because vLLM's wrapper imports Triton."""

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from molora.vllm.wrapper import Gated


class GatedGPU(Gated, PunicaWrapperGPU):  # which vLLM marks as final, for type checkers alone
    """On a GPU: written from vLLM's source, not yet run."""
