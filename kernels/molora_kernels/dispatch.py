"""(token, slot, weight) triples sorted by slot, once for a forward, shared by every module."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class Group:
    """The tokens on which one slot acts. ``tokens`` None: all of them, in order. ``weights`` None: all 1."""

    slot: int
    tokens: torch.Tensor | None  # [N] int64
    weights: torch.Tensor | None  # [N] float32


@dataclass(frozen=True)
class Dispatch:
    """Groups in order of slot. ``everywhere``: each group acts on every token."""

    groups: tuple[Group, ...]
    tokens: int
    everywhere: bool
    _shares: dict[Any, "Shares"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def unit(self) -> bool:
        """Every weight is 1."""
        return all(group.weights is None for group in self.groups)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        return tuple(group.slot for group in self.groups)

    def shares(self, slots: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> "Shares":
        """For factors of ``slots``, of so many ranks, joined: which of the ranks act on each token. Modules whose
        adapters have the same ranks share it."""
        key = (slots, ranks)
        if key not in self._shares:
            table = torch.zeros(self.tokens, len(slots), device=device)
            for group in self.groups:
                if group.slot in slots:
                    rows = slice(None) if group.tokens is None else group.tokens
                    weights = 1.0 if group.weights is None else group.weights.to(table.dtype)
                    table[rows, slots.index(group.slot)] = weights
            weights = table.repeat_interleave(torch.tensor(ranks, device=device), 1)
            self._shares[key] = Shares(weights == 0, None if self.unit else weights)
        return self._shares[key]


@dataclass(frozen=True)
class Shares:
    """``idle``: [T, R] bool, where a rank does not act on a token. ``weights``: [T, R] float32; None: all 1."""

    idle: torch.Tensor
    weights: torch.Tensor | None


def dispatch(slots: torch.Tensor, weights: torch.Tensor, *, uniform: bool = False, unit: bool = False) -> Dispatch:
    """Sorts a plan by slot.

    Args:
        slots: [T, S] int64, -1 for none. A slot occurs at most once in a row.
        weights: [T, S] float32.
        uniform: every row of ``slots`` is known to be the same.
        unit: every weight is known to be 1 and to need no gradient.
    """
    T, S = slots.shape
    if uniform or T == 1:
        groups = [
            Group(slot, None, None if unit else weights[:, column])
            for column, slot in enumerate(slots[0].tolist())
            if slot >= 0
        ]
        return Dispatch(tuple(sorted(groups, key=lambda group: group.slot)), T, True)
    order = slots.flatten().argsort(stable=True)
    present, counts = slots.flatten().unique(return_counts=True)
    flat = weights.flatten()
    groups, first = [], 0
    for slot, count in zip(present.tolist(), counts.tolist(), strict=True):
        pairs = order[first : first + count]  # [N] positions in the flattened plan, so in order of token
        first += count
        if slot >= 0:
            groups.append(Group(slot, None if count == T else pairs // S, None if unit else flat[pairs]))
    return Dispatch(tuple(groups), T, all(group.tokens is None for group in groups))
