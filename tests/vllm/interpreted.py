"""The arithmetic that GPUs have, in Triton's interpreter, behind vLLM's wrapper for CPUs."""

from typing import Any

from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from molora.vllm.wrapper_gpu import Sparse


class Interpreted(Sparse, PunicaWrapperCPU):
    """With ``token_mapping_meta``, as vLLM's wrapper for GPUs has it."""

    def __init__(self, max_num_batched_tokens: int, *args: Any, lora_config: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, *args, lora_config=lora_config, **kwargs)
        self.lora_config = lora_config
        self.token_mapping_meta = LoRAKernelMeta.make(lora_config.max_loras, max_num_batched_tokens, "cpu")

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self.token_mapping_meta.prepare_tensors(self.token_lora_indices)
