"""Generated factors at work in a base while what makes them learns: each sequence of a batch has its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def generated(base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """``base`` with y + B (A x) in some of its linear modules. Gradients go to the factors.

    Args:
        base: whose modules stay what they are: this is by hooks.
        factors: module name -> A [B, R, in] and B [B, out, R], the scale in B; B sequences, or 1 for all of them.
    """
    hooks = [base.get_submodule(name).register_forward_hook(partial(_add, A, B)) for name, (A, B) in factors.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(A: Tensor, B: Tensor, _: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    x = inputs[0]  # [B, T, in]
    z = torch.matmul(x, A.to(x.dtype).transpose(1, 2))  # [B, T, R]
    return y + torch.matmul(z, B.to(x.dtype).transpose(1, 2)).to(y.dtype)
