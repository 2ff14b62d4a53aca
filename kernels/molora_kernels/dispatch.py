"""(token, slot, weight) triples sorted by slot, once for a forward, shared by every module."""

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def unit(self) -> bool:
        """Every weight is 1."""
        return all(group.weights is None for group in self.groups)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        return tuple(group.slot for group in self.groups)


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
