"""Generated factors at work in a base while what makes them learns: each sequence of a batch has its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.factors import Factors

Generated = Mapping[str, tuple[Tensor, Tensor]]
"""The base's module name -> A [B, R, in] and B [B, out, R], the scale in B; B sequences, or 1 for all of them."""


@contextmanager
def generated(base: nn.Module, factors: Generated) -> Iterator[None]:
    """``base`` with y + B (A x) in some of its linear modules, which stay what they are: this is by hooks. Gradients go
    to the factors."""
    hooks = [base.get_submodule(name).register_forward_hook(partial(_add, A, B)) for name, (A, B) in factors.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stacked(factors: Sequence[Factors], device: torch.device | str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Several adapters as one, a row for each; where ranks differ, or one lacks a module, zeros fill them up.

    Args:
        factors: all on one device.
        device: of what is given; None: theirs.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    for one in factors:
        for name, (A, B) in one.items():
            sizes[name] = (max(len(A), sizes.get(name, (0,))[0]), A.shape[1], len(B))
    found = {}
    for name, (rank, inside, outside) in sizes.items():
        like = next(one[name] for one in factors if name in one)  # where they are, which need not be ``device`` yet
        empty = (like[0].new_zeros(0, inside), like[1].new_zeros(outside, 0))
        pairs = [one.get(name, empty) for one in factors]
        found[name] = (
            torch.stack([F.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs]).to(device),
            torch.stack([F.pad(B, (0, rank - B.shape[1])) for _, B in pairs]).to(device),
        )
    return found


def _add(A: Tensor, B: Tensor, _: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    x = inputs[0]  # [B, T, in]
    z = torch.matmul(x, A.to(x.dtype).transpose(1, 2))  # [B, T, R]
    return y + torch.matmul(z, B.to(x.dtype).transpose(1, 2)).to(y.dtype)
