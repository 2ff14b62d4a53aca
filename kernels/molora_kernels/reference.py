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
        y: [T, O], the base's output; its dtype may differ from that of the factors, in which the products are made.
        x: [T, D], its input.
        factors: slot -> its factors.
        plan: of T tokens.

    Returns:
        [T, O].
    """
    for group in plan.groups:
        if group.slot not in factors:
            continue
        A, B = factors[group.slot]
        h = (x if group.tokens is None else x[group.tokens]).to(A.dtype) @ A.T  # [N, R]
        if group.weights is not None:
            h = h * group.weights.to(h.dtype).unsqueeze(1)
        delta = (h @ B.to(h.dtype)).to(y.dtype)  # [N, O]; under autocast h has another dtype than B
        if torch.is_grad_enabled() and (delta.requires_grad or y.requires_grad):
            y = y + delta if group.tokens is None else y.index_add(0, group.tokens, delta)
        elif group.tokens is None:
            y.add_(delta)
        else:
            # A token is in a group once, so this is index_add_, which is slow in half precision on a CPU.
            y.index_copy_(0, group.tokens, y.index_select(0, group.tokens).add_(delta))
    return y
