"""The grouped product in plain PyTorch: the specification of the kernels, and the path on a CPU.

y[t] += sum over slots s that act on token t of  w(t, s) * x[t] A_s^T B_s^T
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from molora_kernels.dispatch import Dispatch


class Factors(NamedTuple):
    """One adapter's factors for one module."""

    A: torch.Tensor  # [R, D] rank x in
    B: torch.Tensor  # [R, O] rank x out, PEFT's lora_B transposed, its scale multiplied in


def add_lora(y: torch.Tensor, x: torch.Tensor, factors: Mapping[int, Factors], plan: Dispatch) -> torch.Tensor:
    """Adds to y [T, O] what the plan's adapters make of x [T, D]; in place where no gradient is needed.

    Work is proportional to the (token, slot) pairs. Slots without factors for this module add nothing.

    Args:
        y: [T, O], the base's output.
        x: [T, D], its input, of the factors' dtype.
        factors: slot -> its factors.
        plan: of T tokens.

    Returns:
        [T, O].
    """
    for group in plan.groups:
        if group.slot not in factors:
            continue
        A, B = factors[group.slot]
        h = (x if group.tokens is None else x[group.tokens]) @ A.T  # [N, R]
        if group.weights is not None:
            h = h * group.weights.to(h.dtype).unsqueeze(1)
        if h.dtype != y.dtype or B.dtype != y.dtype:  # under autocast
            h, B = h.to(y.dtype), B.to(y.dtype)
        if torch.is_grad_enabled() and (h.requires_grad or y.requires_grad):
            y = torch.addmm(y, h, B) if group.tokens is None else y.index_add(0, group.tokens, h @ B)
        elif group.tokens is None:
            y.addmm_(h, B)
        else:
            y.index_add_(0, group.tokens, h @ B)
    return y
