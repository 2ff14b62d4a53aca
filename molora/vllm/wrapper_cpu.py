"""vLLM's LoRA arithmetic on a CPU, in which a token's own adapters are multiplied and no others."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from molora.plan import RoutingPlan
from molora.vllm.routed import Group
from molora_kernels import Dispatch, dispatch


class SparseCPU(PunicaWrapperCPU):
    """y += sum over the adapters k that act on a token of w_k B_k A_k x, by the ranks of one of vLLM's slots that each
    has: all of them where the slot has an ordinary adapter, its own columns where it has a stack.

    So K adapters cost what those cost that act, and a base request among others gets none of theirs (a fault of vLLM's
    own arithmetic there: pull request 48421).
    """

    def __init__(self, max_num_batched_tokens: int, *args: Any, lora_config: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, *args, lora_config=lora_config, **kwargs)
        self._ranks: int = lora_config.max_lora_rank
        self._acting: list[tuple[int, slice]] = []  # slot of vLLM and ranks there, by the slots of the dispatch
        self._work: Dispatch | None = None

    def route(self, tokens: int, routed: Sequence[tuple[Group, RoutingPlan]]) -> None:
        """Until :meth:`done` the first ``tokens`` tokens of forwards have the adapters of these plans, and those of no
        group what vLLM says."""
        ordinary = self._token_lora_indices[:tokens].clone()
        slots = ordinary.new_full((tokens, max([1, *(plan.shape[2] for _, plan in routed)])), -1)
        weights = torch.ones(slots.shape)
        self._acting = []
        for group, plan in routed:
            first, S = len(self._acting), plan.shape[2]
            self._acting += [(group.slot, columns) for columns in group.stack.columns]
            slots[group.at, :S] = torch.where(plan.slots < 0, -1, plan.slots + first)
            weights[group.at, :S] = plan.weights
            ordinary[group.at] = -1
        for slot in ordinary[ordinary >= 0].unique().tolist():
            slots[:, 0] = torch.where(ordinary == slot, len(self._acting), slots[:, 0])
            self._acting.append((slot, slice(0, self._ranks)))
        self._work = dispatch(slots, weights)

    def done(self) -> None:
        """Forwards that follow are vLLM's own: trial runs."""
        self._work = None

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """The ranks that act of y = scale * A x, the others of y are left as they are.

        Args:
            y: a tuple of [tokens, ranks], or [slices, tokens, ranks], float32.
            x: [tokens, D].
            lora_a_stacked: of each slice [slots, 1, ranks, D]; with fully sharded LoRA a worker's share of the ranks.
        """
        if self._work is None:
            super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
            return
        x = x.view(-1, x.shape[-1])
        for rows, slot, columns, _ in self._parts(self._work):
            mine = x[rows].float()
            for h, A in zip(y, lora_a_stacked, strict=True):
                share = A.shape[2]
                first = get_tensor_model_parallel_rank() * share if share < self._ranks else 0
                here = slice(max(columns.start - first, 0), max(min(columns.stop - first, share), 0))
                h[rows, here] = mine @ A[slot, 0, here].float().T * scale

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        **kwargs: Any,
    ) -> None:
        """y += B w x of the ranks that act.

        Args:
            y: [..., O].
            x: as y of :meth:`add_shrink`, with all ranks.
            lora_b_stacked: of each slice [slots, 1, O of the slice, ranks].
            output_slices: O of each slice, the first of which begins in y at ``offset_start``.
        """
        if self._work is None:
            super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, **kwargs)
            return
        y = y.view(-1, y.shape[-1])
        for rows, slot, columns, weights in self._parts(self._work):
            first = offset_start
            for h, B, width in zip(x, lora_b_stacked, output_slices, strict=True):
                mine = h[rows, columns] * weights.unsqueeze(1)
                y[rows, first : first + width] += (mine @ B[slot, 0, :, columns].float().T).to(y.dtype)
                first += width

    def _parts(self, work: Dispatch) -> Iterator[tuple[Any, int, slice, torch.Tensor]]:
        """Of each adapter that acts: the tokens on which it does, the slot and ranks that it has, and its weights."""
        for group in work.groups:
            slot, columns = self._acting[group.slot]
            assert group.weights is not None
            yield slice(0, work.tokens) if group.tokens is None else group.tokens, slot, columns, group.weights
