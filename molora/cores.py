"""Compressed adapters in the pages of kernels: what several share lies there once, of each only its core."""

import torch
from torch.nn.functional import pad

from molora.adapter import SharedBasis
from molora_kernels import Factors
from molora_kernels.order import PagedPlan
from molora_kernels.pages import PAGE, RankPages


def spanned(basis: SharedBasis) -> Factors:
    """A basis as the factors of an adapter, A = V^T and B = U^T, of as many ranks as the larger of them has columns."""
    rank = max(basis.U.shape[1], basis.V.shape[1])
    A, B = (_rows(matrix.T, rank) for matrix in (basis.V, basis.U))
    return Factors(A, B)


def widened(core: Factors, width: int) -> Factors:
    """A core between bases of up to ``width`` columns: a [r, width] and b [r, width]."""
    a, b = (part if part.shape[1] == width else pad(part, (0, width - part.shape[1])) for part in core)
    return Factors(a, b)


def composed(core: Factors, basis: Factors) -> Factors:
    """The ordinary factors of an adapter whose core and basis lie in pages."""
    width = min(core.A.shape[1], len(basis.A))  # beyond it both are zeros
    a, b = (part[:, :width] @ rows[:width] for part, rows in zip(core, basis, strict=True))
    return Factors(a, b)


def add_apart(y: torch.Tensor, x: torch.Tensor, pages: RankPages, plan: PagedPlan, piece: int) -> torch.Tensor:
    """y [..., O of a piece] plus what its compressed adapters add, by products of the library before and after their
    cores; with gradients to y, x [T, D] and the plan's weights."""
    from molora_kernels.paged import add_lora_paged

    assert pages.cores is not None
    core = pages.cores.piece(piece)
    at = plan.slots.clamp_min(0).long()
    for first, count in sorted(pages.shared_runs(piece)):
        rows = slice(first * PAGE, (first + count) * PAGE)
        A, B = (matrix.flatten(0, 1)[rows] for matrix in (pages.A[piece], pages.b_slice(piece)))
        own = (plan.slots >= 0) & (core.count[0][at] > 0) & (pages.first[piece][at] == first)
        width = min(core.inputs, len(A))
        h = pad(x @ A[:width].T, (0, core.inputs - width))
        h = add_lora_paged(torch.zeros_like(h), h, core, plan.slots.masked_fill(~own, -1), plan.weights)
        y = y + (h[:, :width] @ B[:width]).view(y.shape).to(y.dtype)
    return y


def without_cores(plan: PagedPlan, pages: RankPages, piece: int) -> PagedPlan:
    """A plan in which the compressed adapters of a piece do not act."""
    assert pages.cores is not None
    cored = pages.cores.count[piece][plan.slots.clamp_min(0).long()] > 0
    return PagedPlan(plan.slots.masked_fill(cored, -1), plan.weights)


def _rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    return matrix if len(matrix) == count else pad(matrix, (0, 0, 0, count - len(matrix)))
