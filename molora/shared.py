"""What adapters of a compressed store add to a module where torch multiplies them: a way down that all share, a core of
each, a way up."""

from typing import Any

import torch
from torch import nn

from molora.adapter import SharedBasis, SharedWeights
from molora_kernels import Factors


def core_dtype(weight: torch.Tensor) -> torch.dtype:
    """In which torch multiplies the cores of a module with this weight."""
    return torch.float32 if weight.device.type == "cpu" or not weight.is_floating_point() else weight.dtype


class SharedPath:
    """x -> U (sum of the cores that the plan has for each token) V^T x, of one module and one basis.

    The cores are small LoRAs, a module of c inputs and c outputs that has no weights of its own: they are multiplied
    like those of any other module. No part of the base, and so in none of its state dicts.

    Args:
        basis: what they share. module: makes the inner one of a linear module. like: a weight of the base, for dtype
        and device.
    """

    def __init__(self, basis: SharedBasis, module: Any, like: torch.Tensor) -> None:
        self.basis = basis
        dtype = core_dtype(like)
        self.U, self.V = (matrix.to(like.device, dtype) for matrix in (basis.U, basis.V))
        down, up = self.V.shape[1], self.U.shape[1]
        # Without a draw from the random generator, which belongs to whoever trains.
        nothing = nn.utils.skip_init(nn.Linear, down, up, bias=False, device=like.device, dtype=dtype)
        nn.init.zeros_(nothing.requires_grad_(False).weight)
        self.inner = module(nothing)

    def put(self, slot: int, weights: SharedWeights | None, factors: Factors | None = None) -> None:
        """Puts a core into a slot, or empties it. factors: as for :meth:`MoLoRALinear.set_factors`."""
        self.inner.set_factors(slot, None if weights is None else weights.core, self.U.dtype, factors)

    @property
    def adapts(self) -> bool:
        return bool(self.inner.factors)

    def apply(self, change: Any) -> None:
        """``.to()`` and the like."""
        self.U, self.V = change(self.U), change(self.V)
        self.inner._apply(change)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the module's output, [..., out], for x [..., in]."""
        found: torch.Tensor = self.inner(x.to(self.V.dtype) @ self.V) @ self.U.T
        return found
