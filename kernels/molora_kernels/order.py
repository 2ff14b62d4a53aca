"""The order in which the kernels take tokens: those with the same slots next to one another."""

import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from molora_kernels.blocks import Blocks
    from molora_kernels.pages import RankPages

_SORTED_COLUMNS = 3  # of a plan that the order looks at: as many as fit into a key of 64 bits
_BITS = 20  # of a slot in a key
_COUNTED = 8192  # tokens up to which each counts those before it, in one launch; above, a radix sort does less


@dataclass(frozen=True)
class PagedPlan:
    """A plan as the kernels over pages read it. slots: [T, S] int32, -1 for none. weights: [T, S] float32."""

    slots: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def blocks(self) -> "Blocks":
        """Of :func:`molora_kernels.blocks.make_blocks`, made once for all modules."""
        from molora_kernels.blocks import make_blocks  # needs Triton

        return make_blocks(self.slots, order_by_slot(self.slots))

    def gates(self, owner: Hashable, pages: "RankPages") -> tuple[torch.Tensor, ...]:
        """Of :func:`molora_kernels.hot.hot_gates`, in the dtype of the factors.

        Made once for an ``owner`` of few modules, so that few of their gradients are added up in half precision, and in
        float32 once for all pages of one layout.
        """
        from molora_kernels.hot import hot_gates

        layout = pages.layout
        key = (owner, layout, pages.A.dtype)
        if key not in self._gates:
            with shared_by_layers():
                if layout not in self._gates:
                    self._gates[layout] = hot_gates(self.slots, self.weights, pages)
                self._gates[key] = tuple(gate.to(pages.A.dtype) for gate in self._gates[layout])
        return self._gates[key]

    @cached_property
    def _gates(self) -> dict[Hashable, tuple[torch.Tensor, ...]]:
        return {}

    @cached_property
    def columns(self) -> "tuple[PagedPlan, ...]":
        """Each column as a plan of its own, in its own order."""
        return tuple(
            PagedPlan(slots.contiguous().unsqueeze(1), weights.contiguous().unsqueeze(1))
            for slots, weights in zip(self.slots.unbind(1), self.weights.unbind(1), strict=True)
        )


def shared_by_layers() -> saved_tensors_hooks:
    """Around what the first layer that needs it makes for all: a layer that is run again for its gradient finds it
    made, so what it keeps for the way back is no part of that layer's."""
    return saved_tensors_hooks(_same, _same)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def order_by_slot(slots: torch.Tensor) -> torch.Tensor:
    """[T] int64: the tokens by which slots they have, so that a block of them meets few different ones.

    Which of a token's slots is its first makes no difference: with 8 adapters and top-2 a block meets three of them,
    and would meet all if the second column counted only among equals of the first.

    Nothing waits for the device. slots: [T, S] int, -1 for none.
    """
    if len(slots) <= _COUNTED and (slots.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        from molora_kernels.sort import order_by_counting  # needs Triton

        return order_by_counting(slots, _SORTED_COLUMNS, _BITS)
    columns = slots[:, :_SORTED_COLUMNS].sort(1).values.T
    key = columns[0]
    for column in columns[1:]:
        key = (key.long() << _BITS) + column
    return key.argsort(stable=True)
