"""From logits and a selection to the plan: for every token, which slots act and at which weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from molora.selection import LayerCandidates, ResolvedSelection
from molora_kernels import Dispatch, dispatch
from molora_kernels.order import PagedPlan, shared_by_layers

if TYPE_CHECKING:
    from molora_kernels.route import Candidates


@dataclass(frozen=True)
class RoutingPlan:
    """Which slots act on each token.

    chosen: [batch, tokens, S] int32 or int64, the slots, -1 for none. S is the sum of top_k over the stack's layers.
    weights: [batch, tokens, S] float32.
    uniform: every token of every sequence has the same slots. unit: every weight is 1, without a gradient.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    uniform: bool = False
    unit: bool = False

    @property
    def shape(self) -> torch.Size:
        """batch, tokens, S."""
        return self.chosen.shape

    @cached_property
    def slots(self) -> torch.Tensor:
        """[batch, tokens, S] int64, -1 for none."""
        return self.chosen.long()

    @cached_property
    def dispatch(self) -> Dispatch:
        """The plan sorted by slot: made once, shared by all modules."""
        S = self.shape[-1]
        with shared_by_layers():
            weights = self.weights.reshape(-1, S)
            return dispatch(self.slots.reshape(-1, S), weights, uniform=self.uniform, unit=self.unit)

    @cached_property
    def paged(self) -> PagedPlan:
        """The plan as the kernels read it: made once, shared by all modules; nothing waits for the device."""
        S = self.shape[-1]
        return PagedPlan(
            self.chosen.reshape(-1, S).to(torch.int32).contiguous(), self.weights.reshape(-1, S).contiguous()
        )

    @cached_property
    def _elsewhere(self) -> "dict[torch.device, RoutingPlan]":
        return {}

    def on(self, device: torch.device) -> "RoutingPlan":
        """The plan on a device: sent there once, for all modules that a base has there."""
        if self.chosen.device == device:
            return self
        if device not in self._elsewhere:
            chosen, weights = self.chosen.to(device), self.weights.to(device)
            self._elsewhere[device] = RoutingPlan(chosen, weights, self.uniform, self.unit)
        return self._elsewhere[device]

    def at(self, positions: slice | torch.Tensor) -> "RoutingPlan":
        """The plan of some positions of each sequence."""
        return RoutingPlan(self.chosen[:, positions], self.weights[:, positions], self.uniform, self.unit)


def forced_plan(selection: ResolvedSelection, tokens: int) -> RoutingPlan:
    """The plan of what is forced: the same at every token of a sequence."""
    slots, weights = (some.unsqueeze(1).expand(-1, tokens, -1) for some in (selection.forced, selection.shares))
    return RoutingPlan(slots, weights, uniform=selection.uniform, unit=selection.unit)


@dataclass(frozen=True)
class LayerTable:
    """A layer's candidates on the device of the router: what a step would else build and send anew.

    rows: [C] int64, the router's row of each candidate. slots: [C] int64, its slot, -1 for the null.
    """

    candidates: LayerCandidates
    rows: torch.Tensor
    slots: torch.Tensor


def layer_tables(rows: Sequence[str], layers: Sequence[LayerCandidates], device: torch.device) -> list[LayerTable]:
    """The tables of ``layers`` for a router with ``rows``."""
    at = {"": 0} | {name: index for index, name in enumerate(rows)}  # what has no row is never asked for
    return [
        LayerTable(
            layer,
            torch.tensor([at[row] for row in layer.rows], device=device),
            torch.tensor(layer.slots, device=device),
        )
        for layer in layers
    ]


def route(
    logits: torch.Tensor,
    tables: Sequence[LayerTable],
    selection: ResolvedSelection,
    mode: str,
    straight_through: bool,
) -> RoutingPlan:
    """The plan of a router's logits under a selection.

    unit: each of the top-k chosen acts at weight 1; with ``straight_through`` its gradient is that of its probability.
    softmax: the top-k probabilities, renormalised over the chosen, the null among them.

    Args:
        logits: [batch, tokens, rows] float32.
        tables: of the stack's layers.
        selection: for the batch.
        mode: "unit" or "softmax".
        straight_through: give unit weights a gradient.
    """
    batch, tokens = logits.shape[:2]
    slots = selection.forced.unsqueeze(1).expand(batch, tokens, -1).clone()
    weights = selection.shares.unsqueeze(1).expand(batch, tokens, -1)
    for index in selection.routed_layers:
        table = tables[index]
        own = logits.index_select(-1, table.rows)
        chosen, weight = _choose(own, table, selection, mode, straight_through)
        mask = selection.routed[:, index].view(-1, 1, 1)
        k = slice(table.candidates.column, table.candidates.column + chosen.shape[-1])
        slots[..., k] = torch.where(mask, chosen, slots[..., k])
        weights = torch.cat(
            [weights[..., : k.start], torch.where(mask, weight, weights[..., k]), weights[..., k.stop :]], -1
        )
    unit = mode == "unit" and selection.unit and not weights.requires_grad
    return RoutingPlan(slots, weights, uniform=False, unit=unit)


def route_by_kernel(logits: torch.Tensor, found: "Candidates", selection: ResolvedSelection, mode: str) -> RoutingPlan:
    """:func:`route` in one launch on a GPU, without gradients. ``found``: of :func:`kernel_candidates`."""
    from molora_kernels.route import choose  # needs Triton

    plan = choose(logits, found, selection.for_kernels, mode == "softmax")
    return RoutingPlan(*plan, unit=mode == "unit" and selection.unit)


def kernel_candidates(
    rows: Sequence[str], layers: Sequence[LayerCandidates], columns: int, device: torch.device
) -> "Candidates":
    """The candidates of ``layers`` as the routing kernels read them, for a router with ``rows``.

    What ``columns`` has beyond those of the layers is a layer of its own, of which nothing is a candidate.
    """
    from molora_kernels.route import Candidates  # needs Triton

    flat_rows = [rows.index(row) if row else 0 for layer in layers for row in layer.rows]  # as of layer_tables
    flat_slots = [slot for layer in layers for slot in layer.slots]

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    own = sum(layer.top_k for layer in layers)
    firsts, starts = [*(layer.first for layer in layers), len(flat_rows)], [*(layer.column for layer in layers), own]
    if columns > own:
        firsts, starts = [*firsts, len(flat_rows)], [*starts, columns]
    return Candidates(ints(flat_rows), ints(flat_slots), ints(firsts), ints(starts))


def _choose(
    logits: torch.Tensor, table: LayerTable, selection: ResolvedSelection, mode: str, straight_through: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and weights [batch, tokens, k] of one layer, from its candidates' logits [batch, tokens, C]."""
    allowed = selection.allowed[:, table.candidates.all].unsqueeze(1)
    # A sequence in which the layer is not routed allows nothing: its row is overwritten by the caller.
    masked = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    p = masked.softmax(-1)
    top, choice = p.topk(min(table.candidates.top_k, p.shape[-1]), dim=-1)
    slots = table.slots[choice]
    # Fewer candidates allowed than k: what is not allowed must not act.
    slots = slots.masked_fill(~allowed.expand_as(p).gather(-1, choice), -1)
    if mode == "softmax":
        return slots, top / top.sum(-1, keepdim=True)
    # At full weight, what the router holds for worse than none must not act either.
    slots = slots.masked_fill(logits.gather(-1, choice) < logits[..., -1:], -1)
    return slots, 1 + (top - top.detach()) if straight_through else torch.ones_like(top)
