"""The order in which the kernels take tokens: those with the same slots next to one another."""

from dataclasses import dataclass
from functools import cached_property

import torch

FEW_SLOTS = 16  # up to so many, one order serves several columns


@dataclass(frozen=True)
class PagedPlan:
    """A plan as the kernels over pages read it. slots: [T, S] int32, -1 for none. weights: [T, S] float32."""

    slots: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def _orders(self) -> dict[bool, torch.Tensor]:
        return {}

    def order(self, bound: int) -> torch.Tensor:
        """Of :func:`order_by_slot`, made once for all modules."""
        few = bound <= FEW_SLOTS
        if few not in self._orders:
            self._orders[few] = order_by_slot(self.slots, bound)
        return self._orders[few]


def order_by_slot(slots: torch.Tensor, bound: int) -> torch.Tensor:
    """The order of tokens, in which a block of tokens meets few different slots; no host synchronisation.

    Of few slots: [T] int64, one order for all columns, by the first slot, then by the second, and so on, so that one
    pass over the output serves all. Of many: [S, T] int64, an order for each column: no common one would do.

    Args:
        slots: [T, S] int, -1 for none.
        bound: every slot is below it.
    """
    if slots.shape[1] == 1:
        return slots.flatten().argsort(stable=True)
    if bound > FEW_SLOTS:
        return slots.T.contiguous().argsort(dim=1, stable=True)
    key = torch.zeros(slots.shape[0], dtype=torch.int64, device=slots.device)
    # More columns than fit in 63 bits only order less well: a product is right in any order.
    for column in (slots.to(torch.int64) + 1).unbind(1)[: max(1, 62 // (bound + 1).bit_length())]:
        key = key * (bound + 1) + column
    return key.argsort(stable=True)
