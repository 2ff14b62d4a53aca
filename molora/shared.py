"""What adapters of a compressed store add to a module: a way down that all share, a core of each, a way up."""

from itertools import count
from typing import Any

import torch
from torch import nn

from molora.adapter import SharedBasis, SharedWeights
from molora.groups import AdapterGroup
from molora_kernels import Factors
from molora_kernels.pages import Writes


def core_dtype(weight: torch.Tensor, grouped: bool) -> torch.dtype:
    """In which the cores of a module with this weight are multiplied. grouped: by kernels."""
    on_cpu = weight.device.type == "cpu" and not grouped
    return torch.float32 if on_cpu or not weight.is_floating_point() else weight.dtype


class SharedPath:
    """x -> U (sum of the cores that the plan has for each token) V^T x, of one module and one basis.

    The cores are small LoRAs, a module of c inputs and c outputs that has no weights of its own: the kernels or torch
    serve them like those of any other module. No part of the base, and so in none of its state dicts.

    Args:
        basis: what they share. module: makes the inner one of a linear module and its group, or None without kernels.
        grouped: whether kernels serve it. like: a weight of the base, for dtype and device.
    """

    numbers = count()

    def __init__(self, basis: SharedBasis, module: Any, grouped: bool, like: torch.Tensor) -> None:
        self.basis, self.number = basis, next(self.numbers)
        dtype = core_dtype(like, grouped)
        self.U, self.V = (matrix.to(like.device, dtype) for matrix in (basis.U, basis.V))
        down, up = self.V.shape[1], self.U.shape[1]
        # Without a draw from the random generator, which belongs to whoever trains.
        nothing = nn.utils.skip_init(nn.Linear, down, up, bias=False, device=like.device, dtype=dtype)
        nn.init.zeros_(nothing.requires_grad_(False).weight)
        self.inner = module(nothing, AdapterGroup(("core",), down, (up,), dtype, like.device) if grouped else None)

    def put(
        self, slot: int, weights: SharedWeights | None, factors: Factors | None = None, writes: Writes | None = None
    ) -> None:
        """Puts a core into a slot, or empties it. factors, writes: as for :meth:`MoLoRALinear.set_factors`."""
        self.inner.set_factors(slot, None if weights is None else weights.core, self.U.dtype, factors, writes)

    @property
    def adapts(self) -> bool:
        group = self.inner.group
        return bool(self.inner.factors) if group is None else group.adapts

    def apply(self, change: Any) -> None:
        """``.to()`` and the like."""
        self.U, self.V = change(self.U), change(self.V)
        self.inner._apply(change)

    @property
    def version(self) -> tuple[int, int]:
        """Changes with the memory that a captured step reads."""
        group = self.inner.group
        return self.number, 0 if group is None else group.version

    def add(self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, few: bool) -> None:
        """y [T, out], a part of a row's columns perhaps, plus what is added for x [T, in]; by the kernels, in place.

        Args:
            slots, weights: [T, S], the plan's. few: of a decode step, which must not wait for the device.
        """
        from molora_kernels.paged import add_lora_paged

        down = x.to(self.V.dtype) @ self.V
        core = down.new_zeros(len(x), self.U.shape[1])
        add_lora_paged(core, down, self.inner.group.pages, slots, weights, by_token=True if few else None)
        y.add_(core @ self.U.T)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the module's output, [..., out], for x [..., in]."""
        found: torch.Tensor = self.inner(x.to(self.V.dtype) @ self.V) @ self.U.T
        return found
