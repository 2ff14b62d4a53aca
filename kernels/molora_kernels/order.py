"""The order in which the kernels take tokens: those with the same slots next to one another."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class PagedPlan:
    """A plan as the kernels over pages read it. slots: [T, S] int32, -1 for none. weights: [T, S] float32."""

    slots: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def order(self) -> torch.Tensor:
        """Of :func:`order_by_slot`, made once for all modules."""
        return order_by_slot(self.slots)


def order_by_slot(slots: torch.Tensor) -> torch.Tensor:
    """[S, T] int64: for each column of a plan its tokens by slot, so that a block of them meets few different ones.

    Nothing waits for the device. slots: [T, S] int, -1 for none.
    """
    return slots.T.contiguous().argsort(dim=1, stable=True)
