"""vLLM's LoRA arithmetic on a GPU, in which a token's own adapters are multiplied and no others. A file of its own,
because it and vLLM's wrapper need Triton."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from molora.plan import RoutingPlan
from molora.vllm.routed import Group
from molora_kernels.gated import add_gated, open_gates, route_gates

SLICES = 3  # that the kernels take


class Sparse:
    """Put before a Punica wrapper for GPUs. ``gates`` [tokens, ranks] float32 say for each token of a step how much of
    each rank acts: 0 for the base, 1 for an ordinary adapter. ``acts`` [tokens] says in which blocks of ranks a token
    has a gate. Both stay where they are in memory, from which captured graphs read them."""

    def __init__(self, max_num_batched_tokens: int, *args: Any, device: Any, lora_config: Any, **kwargs: Any) -> None:
        super().__init__(  # type: ignore[call-arg]
            max_num_batched_tokens, *args, device=device, lora_config=lora_config, **kwargs
        )
        self.gates = torch.ones(max_num_batched_tokens, lora_config.max_lora_rank, device=device)
        self.acts = torch.full((max_num_batched_tokens,), -1, device=device)

    def route(self, tokens: int, routed: Sequence[tuple[Group, RoutingPlan]]) -> None:
        """The first ``tokens`` tokens of forwards have the adapters of these plans, and those of no group what vLLM
        says."""
        open_gates(self.gates, self.acts, self._token_lora_indices[:tokens])  # type: ignore[attr-defined]
        for group, plan in routed:
            slots, weights = (part.flatten(0, 1).contiguous() for part in (plan.slots, plan.weights))
            route_gates(self.gates, self.acts, group.at.flatten(), slots, weights, group.stack.owners)

    def done(self) -> None:
        """What trial runs come to is of no interest."""

    def add_expand(self, y: torch.Tensor, x: Any, lora_b_stacked: Any, *args: Any, **kwargs: Any) -> None:
        """y += B (gates * x), all ranks: for fully sharded LoRA, in which they are gathered before.

        Args:
            y: [..., O].
            x: a tuple of [tokens, ranks], or [slices, tokens, ranks], float32.
            lora_b_stacked: as of :meth:`add_lora_linear`.
        """
        gates = self.gates[: x[0].shape[0], : x[0].shape[1]]
        # Into new memory: under torch.compile vLLM's own custom ops are what may write in place.
        gated = x * gates if isinstance(x, torch.Tensor) else tuple(slice * gates for slice in x)
        super().add_expand(y, gated, lora_b_stacked, *args, **kwargs)  # type: ignore[misc]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y += B (gates * A x).

        Args:
            y: [..., O].
            x: [tokens, D].
            lora_a_stacked: of each slice [slots, 1, ranks, D].
            lora_b_stacked: of each slice [slots, 1, O of the slice, ranks].
            scale: of vLLM, always 1: it is in B.
            output_slices: O of each slice.
            add_inputs: else y is zeros, and is written to.
        """
        if len(lora_a_stacked) > SLICES:
            given = y, x, lora_a_stacked, lora_b_stacked, scale, output_slices
            super().add_lora_linear(*given, add_inputs=add_inputs, **kwargs)  # type: ignore[misc]
            return
        config, meta = self.lora_config, self.token_mapping_meta  # type: ignore[attr-defined]
        _, order, counts, starts, slots, none, _ = meta.meta_args(x.shape[0], config.specialize_active_lora)
        torch.ops.vllm.molora_add_gated(
            y.view(-1, y.shape[-1]), x, list(lora_a_stacked), list(lora_b_stacked), self.gates, self.acts,
            order, slots, counts, starts, none, add_inputs,
        )  # fmt: skip


class SparseGPU(Sparse, PunicaWrapperGPU):  # which vLLM marks as final, for type checkers alone
    """On a GPU: not yet run on one."""


def _add_gated(
    y: torch.Tensor,
    x: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    gates: torch.Tensor,
    acts: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    none: torch.Tensor,
    add: bool,
) -> None:
    """``none``, on the CPU: no token of the batch has a LoRA, and vLLM left the rest as it was."""
    if not none.item():
        add_gated(y, x, A, B, gates, acts, order, slots, counts, starts, add=add)


# One operation for torch.compile, which does not look into it.
direct_register_custom_op("molora_add_gated", _add_gated, mutates_args=["y"], fake_impl=lambda *_: None)
