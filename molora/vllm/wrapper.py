"""vLLM's LoRA arithmetic with a gate for each token and rank: y = W x + B diag(g) A x."""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class Gated:
    """Put before a Punica wrapper. ``gates`` [tokens, ranks] float32 stay where they are in memory, and say for each
    token of a step how much of each rank acts: 0 for the base, 1 for an ordinary adapter."""

    def __init__(self, max_num_batched_tokens: int, *args: Any, device: Any, lora_config: Any, **kwargs: Any) -> None:
        super().__init__(  # type: ignore[call-arg]
            max_num_batched_tokens, *args, device=device, lora_config=lora_config, **kwargs
        )
        self.gates = torch.ones(max_num_batched_tokens, lora_config.max_lora_rank, device=device)

    def add_expand(self, y: torch.Tensor, x: Any, lora_b_stacked: Any, *args: Any, **kwargs: Any) -> None:
        """y += B (gates * x). x: a tuple of [tokens, ranks], or [slices, tokens, ranks], float32.

        Here rather than after A: with fully sharded LoRA only now all ranks are in one place.
        """
        gates = self.gates[: x[0].shape[0], : x[0].shape[1]]
        # Into new memory: under torch.compile vLLM's own custom ops are what may write in place.
        gated = x * gates if isinstance(x, torch.Tensor) else tuple(slice * gates for slice in x)
        super().add_expand(y, gated, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]


class GatedCPU(Gated, PunicaWrapperCPU):
    """On a CPU. The gate of 0 also undoes a fault of vLLM's (pull request 48421): a base request that is batched with
    others gets the adapter of the last slot there."""
