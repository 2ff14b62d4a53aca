"""Selections: which adapters may act on each sequence, turned into masks that the router and the plan read."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from molora.errors import SelectionError
from molora.stack import AUTO, NONE, SlotTable, Stack, StackLayer

if TYPE_CHECKING:
    from molora_kernels import route

Choice: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
Selection: TypeAlias = Mapping[str, Choice]
"""layer -> "auto" | list of names (the router chooses among these and none, a keyed layer among these) | one name
(forced) | names with weights (all of them are forced, each at its weight times its own scale) | None (off)."""


@dataclass(frozen=True)
class LayerCandidates:
    """A layer's candidates: its adapters in order, then its null."""

    name: str
    names: list[str]  # of its adapters
    top_k: int
    rows: list[str]  # the router's row of each candidate, "" where it has none
    slots: list[int]  # the slot of each candidate, -1 for the null
    first: int  # position of the first among all candidates
    column: int  # first of its top_k columns in a plan

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each adapter stands."""
        return {name: place for place, name in enumerate(self.names)}

    @property
    def all(self) -> slice:
        return slice(self.first, self.first + len(self.slots))

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.top_k)


def column_layers(layers: Sequence[LayerCandidates], columns: int) -> list[str | None]:
    """The layer of each of a plan's columns; None where it is of what stands there."""
    named: list[str | None] = [layer.name for layer in layers for _ in range(layer.top_k)]
    return named + [None] * (columns - len(named))


def candidates(stack: Stack, slots: SlotTable) -> list[LayerCandidates]:
    """The candidates of every layer of ``stack``."""
    result, first, column = [], 0, 0
    for layer in stack.layers:
        names = list(layer.adapters)
        labels = [f"{layer.name}/{name}" for name in names]
        rows = [f"{layer.name}/*"] * len(names) if layer.shared else list(labels)
        rows = [""] * (len(names) + 1) if layer.keyed else [*rows, f"{layer.name}/{NONE}"]
        here = [*slots.of(labels), -1]
        entry = LayerCandidates(layer.name, names, layer.top_k, rows, here, first, column)
        result.append(entry)
        first += len(entry.slots)
        column += layer.top_k
    return result


def without_names(
    layers: Sequence[LayerCandidates], named: Collection[str]
) -> tuple[Sequence[LayerCandidates], list[int] | None]:
    """``layers`` in which those that are ``named`` have their null alone, and which of all candidates are left; None:
    all of them."""
    if not any(layer.name in named for layer in layers):
        return layers, None
    left: list[LayerCandidates] = []
    kept: list[int] = []
    for layer in layers:
        first, own = len(kept), range(layer.first, layer.all.stop)
        if layer.name in named:
            layer = replace(layer, names=[], rows=layer.rows[-1:], slots=layer.slots[-1:])
            own = own[-1:]
        left.append(replace(layer, first=first))
        kept += own
    return left, kept


def router_rows(stack: Stack) -> list[str]:
    """The rows that a router for ``stack`` has: one an adapter (one a shared layer, none a keyed one) and one a layer's
    null."""
    rows: list[str] = []
    for layer in stack.layers:
        if layer.keyed:
            continue
        rows += [f"{layer.name}/*"] if layer.shared else [f"{layer.name}/{name}" for name in layer.adapters]
        rows.append(f"{layer.name}/{NONE}")
    return rows


@dataclass(frozen=True, eq=False)  # equal when the same object: tensors have no one truth
class ResolvedSelection:
    """A selection for N sequences against one stack.

    allowed: bool [N, candidates], what the router may choose (all False in a layer that is forced or off).
    forced: int64 [N, S], the slot that acts in each column of the plan, -1 for none. Where more adapters are forced
    than layers have columns, the rest stands in more columns after them.
    shares: float32 [N, S], the weights of what is forced.
    routed: bool [N, layers], the layers that the router decides; with more columns one more, which it does not.
    routed_layers: those that it decides in at least one sequence. Known here, so that no step has to ask the device.
    """

    allowed: torch.Tensor
    forced: torch.Tensor
    shares: torch.Tensor
    routed: torch.Tensor
    routed_layers: tuple[int, ...]
    uniform: bool  # the same in every sequence
    unit: bool  # every weight of what is forced is 1
    open: tuple[str, ...] = ()  # keyed layers that are left to a question, which is not known here

    @property
    def any_routed(self) -> bool:
        return bool(self.routed_layers)

    @cached_property
    def for_kernels(self) -> "route.Choice":
        """As the routing kernels read it: made once for all forwards under this selection."""
        from molora_kernels import route  # needs Triton

        return route.Choice(self.allowed, self.forced.int(), self.shares, self.routed)

    def expand(self, batch: int) -> "ResolvedSelection":
        """For ``batch`` sequences: one for all, or each repeated in place as beam search and
        ``num_return_sequences`` repeat the prompts.

        Raises:
            SelectionError: the batch is no multiple of the selections.
        """
        count = len(self.allowed)
        if count == batch:
            return self
        if batch % count:
            raise SelectionError(f"{count} selections were given for a batch of {batch} sequences.")
        return self._map(lambda tensor: tensor.repeat_interleave(batch // count, 0))

    def to(self, device: torch.device) -> "ResolvedSelection":
        """On ``device``: itself if it is there, so that what was made from it lasts as long as it does."""
        return self if self.allowed.device == device else self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "ResolvedSelection":
        return replace(
            self,
            allowed=change(self.allowed),
            forced=change(self.forced),
            shares=change(self.shares),
            routed=change(self.routed),
        )


def resolve(
    selection: Selection | Sequence[Selection] | None,
    stack: Stack,
    layers: Sequence[LayerCandidates],
    has_router: bool,
) -> ResolvedSelection:
    """Checks a selection (or one per sequence) against ``stack``, whose adapters are those in ``layers``: so another
    thread may change them meanwhile.

    Raises:
        SelectionError: an unknown layer or adapter, a wrong type, a weight that is no number, "auto" without a router.
    """
    if selection is not None and (isinstance(selection, str) or not isinstance(selection, Mapping | Sequence)):
        raise SelectionError(f"A selection maps layers to choices; {selection!r} does not.")
    many = [selection or {}] if selection is None or isinstance(selection, Mapping) else list(selection)
    if not many:
        raise SelectionError("An empty list of selections was given: give one for each sequence, or one for all.")
    columns = sum(layer.top_k for layer in layers)
    allowed = torch.zeros(len(many), sum(len(layer.slots) for layer in layers), dtype=torch.bool)
    forced: list[dict[int, tuple[int, float]]] = [{} for _ in many]  # column -> slot and weight
    left: dict[str, None] = {}
    routed = torch.zeros(len(many), len(layers), dtype=torch.bool)
    for n, one in enumerate(many):
        _check_layers(one, stack)
        more = columns
        for index, (layer, entry) in enumerate(zip(stack.layers, layers, strict=True)):
            told = has_router or layer.keyed
            choice = one.get(layer.name, layer.default if told or layer.default != AUTO else None)
            names = _allowed_names(layer, entry, choice, told)
            if isinstance(names, Mapping):
                for place, (name, share) in enumerate(names.items()):
                    column = entry.column + place
                    if place >= entry.top_k:
                        column, more = more, more + 1
                    forced[n][column] = (entry.slots[entry.places[name]], share)
            elif names and layer.keyed:
                left[layer.name] = None
            elif names:
                positions = [entry.first + entry.places[name] for name in names]
                allowed[n, [*positions, entry.all.stop - 1]] = True
                routed[n, index] = True
    wide = max(columns, *(max(own, default=-1) + 1 for own in forced))
    slots_of = [[own.get(column, (-1, 1.0))[0] for column in range(wide)] for own in forced]
    shares_of = [[own.get(column, (-1, 1.0))[1] for column in range(wide)] for own in forced]
    if wide > columns:
        routed = torch.cat([routed, torch.zeros(len(many), 1, dtype=torch.bool)], 1)
    return ResolvedSelection(
        allowed,
        torch.tensor(slots_of, dtype=torch.int64).view(len(many), wide),
        torch.tensor(shares_of, dtype=torch.float32).view(len(many), wide),
        routed,
        routed_layers=tuple(routed.any(0).nonzero().flatten().tolist()),
        uniform=bool((allowed == allowed[:1]).all()) and forced.count(forced[0]) == len(forced),
        unit=all(share == 1.0 for own in forced for _, share in own.values()),
        open=tuple(left),
    )


def _check_layers(selection: Any, stack: Stack) -> None:
    if not isinstance(selection, Mapping):
        raise SelectionError(f"A selection maps layers to choices; {selection!r} does not.")
    for name in selection:
        if name not in stack:
            known = ", ".join(layer.name for layer in stack.layers)
            raise SelectionError(f"There is no layer {name!r} in this stack; it has {known}.")


def _allowed_names(
    layer: StackLayer, entry: LayerCandidates, choice: Any, has_router: bool
) -> list[str] | dict[str, float]:
    """The names that the router may choose among ([]: the layer is off), or those that are forced, with weights."""
    if choice is None:
        return []
    if isinstance(choice, str) and choice != AUTO:
        _check_adapter(entry, choice)
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        for name, share in choice.items():
            _check_adapter(entry, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
                raise SelectionError(f"Layer {layer.name!r}: the weight of {name!r} must be a number, not {share!r}.")
        return {name: float(share) for name, share in choice.items()}
    if not isinstance(choice, str) and not (isinstance(choice, Sequence) and all(isinstance(c, str) for c in choice)):
        raise SelectionError(
            f"Layer {layer.name!r}: {choice!r} is no choice. Give 'auto', a name, a list of names, names with "
            f"weights, or None."
        )
    names = entry.names if choice == AUTO else list(dict.fromkeys(choice))
    for name in names:
        _check_adapter(entry, name)
    if layer.shared and len(names) > 1:
        raise SelectionError(
            f"The router cannot tell the adapters of {layer.name!r} apart: name one of {', '.join(entry.names)}."
        )
    if names and not has_router:
        raise SelectionError(
            f"Layer {layer.name!r}: {choice!r} needs a router, and this stack has none. Name one adapter, or train "
            f"a router with `molora train router`."
        )
    return names


def _check_adapter(entry: LayerCandidates, name: str) -> None:
    if name not in entry.places:
        raise SelectionError(
            f"Layer {entry.name!r} has no adapter {name!r}; it has {', '.join(entry.names) or 'none at all'}."
        )
