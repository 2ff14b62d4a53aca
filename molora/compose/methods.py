"""What each way of merging makes of one module's factors. The deltas are s B A, s being the adapter's own scale.

cat and svd are of the weighted sum of the deltas: all of it, or the best of a rank. linear, ties (arXiv 2306.01708),
dare (2311.03099) and magnitude_prune act on A and B apart, as PEFT's do, which has cross terms; with _svd on deltas, of
which they then keep the best of a rank. knots (2410.19735) is TIES in the basis that the deltas share.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import copysign, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from molora.adapter import LoRAWeights
from molora.factors import nearest

Method = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd", "knots",
]  # fmt: skip
OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Those that need one rank."""

# Of numbers, where the border of the largest ones is looked for.
_SAMPLE = 8192
# Of the energy; where less is cut away, float32 does not tell it from rounding.
_PLAIN = 0.1


def merged(
    parts: Sequence[LoRAWeights],
    weights: Sequence[float],
    method: Method,
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """One module's factors, merged; the scale is 1.

    Args:
        parts: A [r_i, in], B [out, r_i], float32, and the scale, of each adapter that has the module; one that has not
            is zero there, which in every method is to be left out.
        weights: of the parts, in their order.
        density: share of the numbers that pruning keeps.
        rank: of svd and what ends in _svd, None: the largest of the parts'; of knots, None: all of it.
        seed: of DARE's random choice.

    Returns:
        A [R, in], B [out, R], float32.
    """
    generator = torch.Generator().manual_seed(seed)
    if method in OF_FACTORS:
        shares = [weight * part.scale for weight, part in zip(weights, parts, strict=True)]
        # The sign on one side alone, or two of them would cancel.
        roots = [copysign(sqrt(abs(share)), share) for share in shares]
        A = combined((part.A.clone() for part in parts), roots, method, density, generator)
        B = combined((part.B.clone() for part in parts), [abs(root) for root in roots], method, density, generator)
        return A, B
    if method == "cat":
        A, B = weighted_sum(parts, weights, torch.float32)
    elif method == "svd":
        A, B = nearest(*weighted_sum(parts, weights), rank or _largest_rank(parts))
    elif method == "knots":
        A, B = _knots(parts, weights, density, generator)
        A, B = (A, B) if rank is None else nearest(A, B, rank)
    else:
        deltas = (part.B * part.scale @ part.A for part in parts)
        delta = combined(deltas, weights, method.removesuffix("_svd"), density, generator)
        A, B = nearest_of_delta(delta, rank or _largest_rank(parts))
    return A.float(), B.float()


def weighted_sum(
    parts: Sequence[LoRAWeights], weights: Sequence[float], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The sum of w s B A, exactly: A [sum of ranks, in], B [out, sum of ranks]."""
    return (
        torch.cat([part.A.to(dtype) for part in parts]),
        torch.cat([part.B.to(dtype) * (weight * part.scale) for weight, part in zip(weights, parts, strict=True)], 1),
    )


def nearest_of_delta(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The delta of ``rank`` that is nearest to one without factors, [out, in] float32: by the eigenvectors of its
    smaller Gram matrix.

    float32 finds them well enough where much is cut away; elsewhere float64 does, in twice the time.
    """
    tall = delta.shape[0] > delta.shape[1]
    side = delta.T if tall else delta  # [less, more]
    least, most = _projected(side, rank)
    energy = float(side.square().sum(dtype=torch.float64))
    if energy - float(most.square().sum(dtype=torch.float64)) < _PLAIN * energy:
        least, most = _projected(side.double(), rank)
    root = torch.linalg.vector_norm(most, dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # [R]
    least, most = least * root, most / root.unsqueeze(1)
    return (least.T, most.T) if tall else (most, least)


def _projected(side: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` first left singular vectors U [less, R] of ``side``, and U^T side [R, more]."""
    first = torch.linalg.eigh(side @ side.T).eigenvectors[:, -rank:].flip(1)
    return first, first.T @ side


def combined(
    tensors: Iterable[Tensor], weights: Sequence[float], kind: str, density: float, generator: torch.Generator
) -> Tensor:
    """Tensors of one shape, pruned and summed: PEFT's function of that name in ``peft.utils.merge_utils``.

    The same numbers are kept, also by chance from the same seed; it is several times as fast, and without ties only one
    tensor is held at a time. The tensors are written over.
    """
    kept = (_pruned(tensor, kind, density, generator) for tensor in tensors)
    if kind.endswith("ties"):
        return _elected(list(kept), weights)
    total = next(kept).mul_(weights[0])
    for weight, tensor in zip(weights[1:], kept, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _pruned(tensor: Tensor, kind: str, density: float, generator: torch.Generator) -> Tensor:
    if density == 1 or kind == "linear":
        return tensor
    if kind.startswith("dare"):
        # What torch.bernoulli draws, in a quarter of the time.
        return tensor.mul_(torch.empty_like(tensor).uniform_(generator=generator).lt_(density)).div_(density)
    return _largest(tensor, density)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The others become 0; of equal ones at the border the first are kept."""
    count = int(density * tensor.numel())
    if count == 0:
        return tensor.zero_()
    sizes = tensor.abs().flatten().numpy()
    border = _border(sizes, count)
    # As a mask would, in a tenth of the time.
    torch.hardshrink(tensor, float(np.nextafter(border, border.dtype.type(0))), out=tensor)
    surplus = np.count_nonzero(sizes >= border) - count
    if surplus > 0:
        tensor.view(-1)[np.flatnonzero(sizes == border)[-surplus:]] = 0
    return tensor


def _border(sizes: np.ndarray, count: int) -> np.floating:
    """The ``count``-th largest: among those that are near it in a sample, where it is there."""
    sample = np.sort(sizes[:: max(1, len(sizes) // _SAMPLE)])
    place, room = int((1 - count / len(sizes)) * len(sample)), len(sample) // 40
    low, high = sample[max(place - room, 0)], sample[min(place + room, len(sample) - 1)]
    left = count - np.count_nonzero(sizes > high)
    near = sizes[(sizes >= low) & (sizes <= high)]
    return np.partition(near, -left)[-left] if 0 < left <= len(near) else np.partition(sizes, -count)[-count]


def _elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES: of every number the sign that has more, and the weighted sum of those of that sign, by their count."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    sign = total.ge(0).to(total).mul_(2).sub_(1)
    total.zero_()
    agreeing, count = torch.empty_like(total), torch.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        torch.mul(tensor, sign, out=agreeing).relu_()
        total.add_(agreeing, alpha=weight)
        count.add_(agreeing.sign_())
    return total.mul_(sign).div_(count.clamp_min_(1))


def _knots(
    parts: Sequence[LoRAWeights], weights: Sequence[float], density: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[dW_1 | ... | dW_n] = U diag(s) [V_1^T | ... | V_n^T]; TIES of the diag(s) V_i^T, times U: by factors.

    With [B_1 ... B_n] = Q [R_1 ... R_n], U is Q times the left singular vectors u of [R_1 A_1 | ...], whose own factors
    are small, and diag(s) V_i^T is u^T R_i A_i. float64, but for TIES.
    """
    q_out, r_out = torch.linalg.qr(torch.cat([part.B.double() * part.scale for part in parts], 1))
    ends = np.cumsum([0, *(part.rank for part in parts)]).tolist()
    own = [r_out[:, start:end] for start, end in pairwise(ends)]  # [k, r_i] each
    inner = [torch.linalg.qr(part.A.double().T, mode="r").R.T for part in parts]  # [r_i, at most in]
    left, values, _ = torch.linalg.svd(
        torch.cat([mine @ small for mine, small in zip(own, inner, strict=True)], 1), full_matrices=False
    )
    # Below what float32 sources say, a number is noise, and TIES would count it as one that agrees.
    noise = float(values[0]) * torch.finfo(torch.float32).eps
    left = left[:, : max(1, int((values > noise).sum()))]
    aligned = [left.T @ mine @ part.A.double() for mine, part in zip(own, parts, strict=True)]  # [K, in] each
    clean = [torch.hardshrink(tensor.float(), noise) for tensor in aligned]
    return combined(clean, weights, "ties", density, generator).double(), q_out @ left


def _largest_rank(parts: Sequence[LoRAWeights]) -> int:
    return max(part.rank for part in parts)
