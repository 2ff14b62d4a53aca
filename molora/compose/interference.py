"""How much adapters fight, pair by pair, read from their weights; and whether to merge, stack or route them.

The advice is by rules of thumb, whose numbers are the constants below. Where losses are measured, these decide: what
weights say of what a model will say is little. Adapters whose training began from one seed share input directions that
none of them has learnt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from molora.errors import AdapterMismatchError
from molora.factors import Factors

Advice = Literal["merge", "stack", "route"]

SAME_WAY = 0.3
"""Two deltas of this cosine or more pull the same way."""
ORTHOGONAL, FEW, CHANCE = 0.1, 0.2, (0.4, 0.6)
"""Two deltas barely touch: |cosine| and shared input directions below the first two, opposite signs as by chance."""
TOLERABLE = 0.02
"""The share of what an adapter gains over the base that another may cost it."""

_EDGE = 1e-6  # of the largest singular value: what is smaller is no direction
_BLOCK = 2**20  # numbers of all deltas at a time


@dataclass(frozen=True)
class Pair:
    """Two adapters, over the modules that both adapt.

    modules: how many these are.
    overlap_in, overlap_out: 0 to 1, ||Q1^T Q2||_F^2 / min(r1, r2), Q being orthonormal bases of what A reads and B
        writes; the mean over modules, weighted by ||delta_1|| ||delta_2||.
    cosine: -1 to 1, of the deltas, all modules as one vector.
    sign_conflict: 0 to 1, the share of the numbers with opposite signs, each counted by the smaller magnitude; 0.5 is
        chance.
    costs: nats a token that the second costs the first on its data, and the first the second; None: not measured.
    why: the advice's reason, a clause.
    """

    first: str
    second: str
    modules: int
    overlap_in: float
    overlap_out: float
    cosine: float
    sign_conflict: float
    costs: tuple[float, float] | None
    advice: Advice
    why: str


@torch.no_grad()
def pairs(adapters: Mapping[str, Factors], losses: Tensor | None = None) -> list[Pair]:
    """Each two of N adapters. The deltas are made in blocks of rows, one module at a time.

    Args:
        adapters: by name.
        losses: [N, N + 1] nats a token, of adapter i's data: in column j with j added to i (i alone where j is i), in
            the last one the base's; rows of NaN where there is no data.

    Raises:
        AdapterMismatchError: two of them are of different sizes in a module.
    """
    names = list(adapters)
    total = torch.zeros(8, len(names), len(names), dtype=torch.float64)
    for module in dict.fromkeys(module for factors in adapters.values() for module in factors):
        places = torch.tensor([place for place, name in enumerate(names) if module in adapters[name]])
        if len(places) > 1:
            own = {names[place]: adapters[names[place]][module] for place in places.tolist()}
            _check_sizes(module, own)
            total[:, places[:, None], places] += _compared(list(own.values())).cpu()
    modules, inner, energy, weight, inside, outside, shared, opposed = total
    cosine = _ratio(inner, (energy * energy.T).sqrt()).clamp(-1, 1)
    figures = torch.stack([_ratio(inside, weight), _ratio(outside, weight), cosine, _ratio(opposed, shared)], -1)
    found = []
    for i, j in combinations(range(len(names)), 2):
        both, count = (names[i], names[j]), int(modules[i, j])
        reads, writes, angle, conflict = figures[i, j].tolist()
        measured = None if losses is None else losses[[i, j]][:, [i, j, -1]].double()  # [2, 3]
        if measured is None or not bool(measured.isfinite().all()):
            costs, (advice, why) = None, by_weights(count, reads, angle, conflict)
        else:
            costs, (advice, why) = _costs(measured), by_losses(both, measured, angle)
        found.append(Pair(*both, count, reads, writes, angle, conflict, costs, advice, why))
    return found


def by_weights(modules: int, overlap_in: float, cosine: float, sign_conflict: float) -> tuple[Advice, str]:
    """What to do with a pair, and why, by its figures alone."""
    if not modules:
        return "stack", "they adapt no module in common"
    as_by_chance = not sign_conflict or CHANCE[0] <= sign_conflict <= CHANCE[1]  # none at all: no number in common
    if abs(cosine) < ORTHOGONAL and overlap_in < FEW and as_by_chance:
        return "stack", f"they barely touch: cosine {cosine:z.2f}, {overlap_in:.0%} of the input directions shared"
    if cosine >= SAME_WAY:
        return "merge", f"they pull the same way: cosine {cosine:.2f}"
    if cosine <= -ORTHOGONAL:
        return "route", f"they pull against each other: cosine {cosine:.2f}"
    return "route", (
        f"they meet without agreeing: cosine {cosine:z.2f}, {overlap_in:.0%} of the input directions shared, "
        f"{sign_conflict:.0%} of the signs opposite"
    )


def by_losses(names: tuple[str, str], losses: Tensor, cosine: float) -> tuple[Advice, str]:
    """What to do with a pair, and why, by what each costs the other.

    Args:
        losses: [2, 3], of the first's data and the second's: with the first, with the second, and the base's; the other
            one is added to the data's own.
    """
    gains = [float(losses[k, 2] - losses[k, k]) for k in range(2)]
    lost = [cost / gain if gain > 0 else math.inf for cost, gain in zip(_costs(losses), gains, strict=True)]
    worse = lost.index(max(lost))
    if gains[worse] <= 0:
        return "route", f"{names[worse]} gains nothing over the base on its own data"
    if lost[worse] > TOLERABLE:
        return "route", f"{names[1 - worse]} costs {names[worse]} {lost[worse]:.0%} of its gain over the base"
    kept = f"neither costs the other more than {max(lost[worse], 0):.1%} of its gain over the base"
    if cosine >= SAME_WAY:
        return "merge", f"they pull the same way (cosine {cosine:.2f}), and {kept}"
    return "stack", kept


def _costs(losses: Tensor) -> tuple[float, float]:
    return float(losses[0, 1] - losses[0, 0]), float(losses[1, 0] - losses[1, 1])


def _check_sizes(module: str, own: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    sizes = {name: (A.shape[1], len(B)) for name, (A, B) in own.items()}
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise AdapterMismatchError(
                f"In {module!r} {first} maps {size[0]} to {size[1]} features and {name} {other[0]} to {other[1]}: they "
                f"are of different bases, so that they cannot be compared."
            )


def _compared(own: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 [8, n, n] of n adapters in one module: 1, <delta_i, delta_j>, ||delta_i||^2, ||delta_i|| ||delta_j||, the
    overlaps times that, and the sums of smaller magnitudes: all, and of opposite signs (above the diagonal)."""
    A = torch.cat([A.double() for A, _ in own])  # [R of all, in]
    B = torch.cat([B.double() for _, B in own], 1)  # [out, R of all]
    inner = _blocks((B.T @ B) * (A @ A.T), [len(A) for A, _ in own])
    energy = inner.diagonal().clamp_min(0).unsqueeze(1).expand_as(inner)
    weight = (energy * energy.T).sqrt()
    inside, outside = _overlaps([A.T for A, _ in own]), _overlaps([B for _, B in own])
    return torch.stack(
        [torch.ones_like(inner), inner, energy, weight, weight * inside, weight * outside, *_magnitudes(own)]
    )


def _overlaps(spans: Sequence[Tensor]) -> Tensor:
    """[n, n] of n column spaces."""
    bases = [_basis(span) for span in spans]
    ranks = torch.tensor([basis.shape[1] for basis in bases], device=bases[0].device)
    joined = torch.cat(bases, 1)
    return _ratio(_blocks((joined.T @ joined).square(), ranks.tolist()), torch.minimum(ranks[:, None], ranks))


def _basis(span: Tensor) -> Tensor:
    """Orthonormal, float64, of a column space; of as many directions as there are in truth."""
    q, r = torch.linalg.qr(span.double())
    left, values, _ = torch.linalg.svd(r)
    return q @ left[:, values > _EDGE * values.max()]


def _magnitudes(own: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[2, n, n]: the sums of min(|d_i|, |d_j|), and of those where d_i d_j < 0; above the diagonal."""
    first, out = own[0][0], len(own[0][1])
    found = torch.zeros(2, len(own), len(own), dtype=torch.float64, device=first.device)
    rows = max(_BLOCK // (len(own) * first.shape[1]), 1)
    for start in range(0, out, rows):
        deltas = torch.stack([B[start : start + rows].float() @ A.float() for A, B in own])  # [n, rows, in]
        sizes, below = deltas.abs(), deltas < 0
        for i in range(len(own) - 1):
            smaller = torch.minimum(sizes[i], sizes[i + 1 :])
            found[0, i, i + 1 :] += smaller.sum((1, 2))
            found[1, i, i + 1 :] += smaller.masked_fill_(below[i] == below[i + 1 :], 0).sum((1, 2))
    return found


def _blocks(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """[n, n]: the sums of the blocks of ``values`` [R, R], R being the sum of n ``ranks``."""
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(values.device)
    found = values.new_zeros(len(ranks), len(owner)).index_add(0, owner, values)
    return values.new_zeros(len(ranks), len(ranks)).index_add(1, owner, found)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is."""
    return torch.where(whole > 0, part / whole, 0)
