"""The routes of a captured decode step: the router's weights, the sequences' selections and memories, in memory that
never moves. A change of selection or a new sequence writes into it; the captured step stays what it is."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from molora.memory import Memory
from molora.plan import kernel_candidates
from molora.router import Router
from molora.routing import RoutingState
from molora.selection import ResolvedSelection, without_names
from molora_kernels.blocks import Blocks, list_slots, make_blocks
from molora_kernels.route import Choice, RouterWeights, StepState, route_step

BY_SLOT = 4  # sequences from which on an adapter is read once for all that it acts on


class StepRoutes:
    """For each region of the model (below the layer at which a deeper part of the router reads, and from it on) the
    slots [N, S] int32 and weights [N, S] float32 of one token of each of N sequences.

    Args:
        routing: which adapters act.
        batch: N.
        device: of the model.
        more: columns of a selection that forces more adapters than the stack's layers have columns.
        named: layers whose adapters act by name alone, so that those that come and go change nothing of the step.
        states: by part of the router, what it remembers of each sequence, in memory that is given; None: of its own.
    """

    def __init__(
        self,
        routing: RoutingState,
        batch: int,
        device: torch.device,
        more: int = 0,
        named: Collection[str] = (),
        states: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.routing = routing
        self.boundary = routing.boundary
        router = routing.router
        self.layers, self._columns = without_names(routing.layers, named)
        columns = sum(layer.top_k for layer in self.layers) + more
        count = sum(len(layer.slots) for layer in self.layers)
        self.choice = Choice(
            torch.zeros(batch, count, dtype=torch.bool, device=device),
            torch.full((batch, columns), -1, dtype=torch.int32, device=device),
            torch.ones(batch, columns, device=device),
            torch.zeros(batch, len(self.layers) + bool(more), dtype=torch.bool, device=device),
        )
        self.real = torch.ones(batch, dtype=torch.bool, device=device)
        self.each = torch.arange(batch, device=device)
        self.parts: list[Any] = []
        self.weights: list[RouterWeights] = []
        self.states: list[StepState] = []
        if isinstance(router, Router):
            self.candidates = kernel_candidates(router.rows, self.layers, columns, device)
            embedding = routing.base.get_input_embeddings()
            for part in router._parts:
                table = torch.zeros(batch, part.width, device=device)
                if part.reads == 0:
                    table = part.folded(embedding, device)
                weights = replace(part.for_kernels(table), decays=part.decays.detach().clone())
                self.parts.append(part)
                self.weights.append(weights)
                self.states.append(StepState.new(batch, weights, columns))
                if states is not None:
                    self.states[-1].memory = states[len(self.states) - 1]
        different = len({slot for layer in self.layers for slot in layer.slots} - {-1})
        if named:
            different += batch * columns
        self._blocks: dict[int, Blocks] = {}  # by the address of the slots that they list
        if batch >= BY_SLOT and columns:
            for slots in (self.choice.forced, *(state.slots for state in self.states)):
                self._blocks[slots.data_ptr()] = make_blocks(slots, None, different)

    @torch.no_grad()
    def start(self, selection: ResolvedSelection, memories: Sequence[Memory] | None) -> None:
        """Takes over the selections of the sequences, which may be fewer than N, and what the router remembers of
        them."""
        allowed = selection.allowed if self._columns is None else selection.allowed[:, self._columns]
        for mine, given, nothing in (
            (self.choice.allowed, allowed, False),
            (self.choice.forced, selection.forced, -1),
            (self.choice.shares, selection.shares, 1),
            (self.choice.routed, selection.routed, False),
        ):
            mine[: len(given)].copy_(given)
            mine[len(given) :].fill_(nothing)
        self._list(self.choice.forced)
        for part, weights in zip(self.parts, self.weights, strict=True):
            weights.decays.copy_(part.decays)  # a router may have been trained on since
            if part.reads == 0 and part.table is not weights.table:
                if part.table is None:
                    part.fold(self.routing.base.get_input_embeddings(), weights.table.device)
                weights.table.copy_(part.table)
                part.table = weights.table
        for state, memory in zip(self.states, memories or (), strict=False):
            state.memory.copy_(memory.state)

    def read_tokens(self, ids: torch.Tensor, pdl: bool = False) -> None:
        """Routes by token ids [N], where a part of the router reads them."""
        if self.parts and self.parts[0].reads == 0:
            self._step(0, ids, pdl)

    def read_hidden(self, hidden: torch.Tensor, pdl: bool = False) -> None:
        """Routes by hidden states [N, D] before layer ``boundary``."""
        self.weights[-1].table.copy_(self.parts[-1].read(hidden))
        self._step(len(self.parts) - 1, self.each, pdl)

    def plan(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """slots and weights for the modules of decoder layer ``layer``."""
        if self.boundary is not None and layer >= self.boundary:
            return self.states[-1].slots, self.states[-1].weights
        if self.parts and self.parts[0].reads == 0:
            return self.states[0].slots, self.states[0].weights
        return self.choice.forced, self.choice.shares

    def blocks(self, layer: int) -> Blocks | None:
        """The lists of what :meth:`plan` gives; None for few sequences, whose adapters are taken token by token."""
        return self._blocks.get(self.plan(layer)[0].data_ptr())

    def _list(self, slots: torch.Tensor) -> None:
        blocks = self._blocks.get(slots.data_ptr())
        if blocks is not None:
            list_slots(slots, blocks)

    def _step(self, index: int, ids: torch.Tensor, pdl: bool) -> None:
        assert self.routing.router is not None
        softmax = self.routing.router.weights == "softmax"
        route_step(
            ids, self.real, self.weights[index], self.candidates, self.choice, self.states[index], softmax, pdl
        )  # fmt: skip
        self._list(self.states[index].slots)
