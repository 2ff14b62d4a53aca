"""vLLM's LoRA arithmetic with a gate for each token and rank: y = W x + B diag(g) A x."""

from collections.abc import Sequence
from typing import Any

import torch

from molora.plan import RoutingPlan
from molora.vllm.routed import Group


class Gated:
    """Put before a Punica wrapper. ``gates`` [tokens, ranks] float32 stay where they are in memory, and say for each
    token of a step how much of each rank acts: 0 for the base, 1 for an ordinary adapter."""

    def __init__(self, max_num_batched_tokens: int, *args: Any, device: Any, lora_config: Any, **kwargs: Any) -> None:
        super().__init__(  # type: ignore[call-arg]
            max_num_batched_tokens, *args, device=device, lora_config=lora_config, **kwargs
        )
        self.gates = torch.ones(max_num_batched_tokens, lora_config.max_lora_rank, device=device)

    def route(self, tokens: int, routed: Sequence[tuple[Group, RoutingPlan]]) -> None:
        """The first ``tokens`` tokens of forwards have the adapters of these plans, and those of no group what vLLM
        says."""
        indices: torch.Tensor = self._token_lora_indices  # type: ignore[attr-defined]
        self.gates[:tokens] = (indices[:tokens] >= 0).unsqueeze(1)
        for group, plan in routed:
            adapters, owners = len(group.stack.columns), group.stack.owners
            # One more place, for null in the plan and for the columns that pad the rank.
            weights = plan.weights.new_zeros(*plan.shape[:2], adapters + 1)
            weights.scatter_add_(2, plan.slots.masked_fill(plan.slots < 0, adapters), plan.weights.contiguous())
            weights[..., adapters] = 0
            self.gates[group.at, : len(owners)] = weights[..., owners]

    def done(self) -> None:
        """What trial runs come to is of no interest."""

    def add_expand(self, y: torch.Tensor, x: Any, lora_b_stacked: Any, *args: Any, **kwargs: Any) -> None:
        """y += B (gates * x). x: a tuple of [tokens, ranks], or [slices, tokens, ranks], float32.

        Here rather than after A: with fully sharded LoRA only now all ranks are in one place.
        """
        gates = self.gates[: x[0].shape[0], : x[0].shape[1]]
        # Into new memory: under torch.compile vLLM's own custom ops are what may write in place.
        gated = x * gates if isinstance(x, torch.Tensor) else tuple(slice * gates for slice in x)
        super().add_expand(y, gated, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]
