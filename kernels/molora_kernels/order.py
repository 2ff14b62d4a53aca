"""The order in which the kernels take tokens: those with the same slots next to one another."""

from dataclasses import dataclass
from functools import cached_property

import torch

_BITS = 15  # of a slot in a key; larger ones only order less well: a product is right in any order


@dataclass(frozen=True)
class PagedPlan:
    """A plan as the kernels over pages read it. slots: [T, S] int32, -1 for none. weights: [T, S] float32."""

    slots: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def order(self) -> torch.Tensor:
        """[T] int64, made once for all modules."""
        return order_by_slot(self.slots)


def order_by_slot(slots: torch.Tensor) -> torch.Tensor:
    """[T] int64: tokens with the same slots next to one another; no host synchronisation.

    Ordered by the first slot, then by the second, and so on, so that a block of tokens meets few different slots in
    each column.

    Args:
        slots: [T, S] int, -1 for none.
    """
    if slots.shape[1] == 1:
        return slots.flatten().argsort(stable=True)
    key = torch.zeros(slots.shape[0], dtype=torch.int64, device=slots.device)
    for column in (slots.to(torch.int64) + 1).unbind(1)[: 62 // _BITS]:
        key = (key << _BITS) + column
    return key.argsort(stable=True)
