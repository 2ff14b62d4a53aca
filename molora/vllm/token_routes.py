"""Routes of one token of each of several sequences in a few launches, where Triton runs: what decoding needs at each
step."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from molora.plan import RoutingPlan, kernel_candidates
from molora.selection import LayerCandidates, ResolvedSelection
from molora.vllm.memory import SlotMemory
from molora_kernels.route import Candidates, Choice, RouterWeights, StepState, route_step


class TokenRoutes:
    """Of a router's part that reads token ids.

    Args:
        part: of the router, with its table.
        rows: the router's.
        layers: the stack's.
        softmax: whether the weights of the chosen are their probabilities.
        columns: where the part's memory lies among what is kept of a token.
    """

    def __init__(
        self, part: Any, rows: Sequence[str], layers: Sequence[LayerCandidates], softmax: bool, columns: slice
    ) -> None:
        self.rows, self.layers, self.softmax, self.columns = rows, layers, softmax, columns
        self.weights: RouterWeights = part.for_kernels(part.table)
        self._buffers = lru_cache(maxsize=256)(self._make)

    def plan(
        self,
        selection: ResolvedSelection,
        ids: torch.Tensor,
        before: torch.Tensor,
        slots: torch.Tensor,
        memory: SlotMemory,
    ) -> RoutingPlan:
        """The plan of a token of each of n sequences.

        Args:
            selection: of one sequence, for all of these.
            ids: [n] int64, contiguous.
            before: [n] int64, the KV slot of the token before each.
            slots: [n, 1] int64, its own.
            memory: which is advanced by them.
        """
        real, choice, candidates, state = self._buffers(selection, len(ids))
        # A step may have several plans of as many sequences, which wait for each other.
        state.slots, state.weights = torch.empty_like(state.slots), torch.empty_like(state.weights)
        state.memory.copy_(memory.read(before, self.columns).view_as(state.memory))
        route_step(ids, real, self.weights, candidates, choice, state, self.softmax)
        memory.write(slots, self.columns, state.memory.flatten(1).unsqueeze(1))
        return RoutingPlan(state.slots.unsqueeze(1), state.weights.unsqueeze(1))

    def _make(self, selection: ResolvedSelection, count: int) -> tuple[torch.Tensor, Choice, Candidates, StepState]:
        device, columns = self.weights.w1.device, selection.forced.shape[1]
        candidates = kernel_candidates(self.rows, self.layers, columns, device)
        real = torch.ones(count, dtype=torch.bool, device=device)
        return real, selection.expand(count).for_kernels, candidates, StepState.new(count, self.weights, columns)
