"""Compress then Serve (arXiv 2407.00066): of many adapters' deltas in one module, two bases that all share, and of each
adapter a small core between them.

    min over U, V, S_k of  sum_k ||Delta_k / ||Delta_k|| - U S_k V^T||_F^2,   S_k = U^T Delta_k V,   U, V orthonormal

Given V, the best U are the top eigenvectors of sum_k Delta_k V V^T Delta_k^T / ||Delta_k||^2; given U, V likewise. A
delta [out, in] is never made: all is of its factors. Nor is a matrix [in, in]: the alternation is between the few
directions that hold nearly all of the deltas, found by two steps of orthogonal iteration from random ones
(arXiv 0909.4061, algorithm 4.4).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molora.errors import ConfigError, DataError

_SPAN = 4  # times c: as many directions are looked for before the alternation; what is beyond is out of its reach
_FEWEST = 64  # of them: all, where a module is that small
_NOTHING = 1e-12  # of the largest eigenvalue: what is below is rounding, not a direction
_CANCELLED = 1e-14  # of ||A||^2 ||B||^2: what is below is rounding, not a delta


@dataclass(frozen=True, eq=False)
class Basis:
    """What the adapters share in one module: delta ~ U S V^T, a core S [c, c] of each. One object for all of them."""

    U: Tensor  # [out, c] float32
    V: Tensor  # [in, c] float32; U or V has fewer columns where no delta needs more

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """U^T U and V^T V, float64: the identity, but for what rounding has left of it."""
        U, V = self.U.double(), self.V.double()
        return U.T @ U, V.T @ V


def fit(
    factors: Callable[[], Iterable[tuple[Tensor, Tensor]]], size: int, rounds: int = 10, tolerance: float = 1e-4
) -> Basis:
    """The basis of one module, by alternation from the deltas' common right singular space.

    Every adapter counts alike, whatever its norm; one whose delta is zero does not count. One is in memory at a time;
    of each stay its coordinates in the directions, 4 r (s_in + s_out) bytes where s is 4 c or the module's size.

    Args:
        factors: gives the adapters' A [r, in] and B [out, r], the scale in B; called 3 times.
        size: c, the most columns of U and of V.
        rounds: the most.
        tolerance: a round that brings less than this share of the deltas' squared norm is the last.

    Raises:
        ConfigError: a setting is out of range. DataError: there are no factors.
    """
    if size < 1 or rounds < 1:
        raise ConfigError(f"A basis has at least 1 direction, found in at least 1 round, not {size} in {rounds}.")
    P, Q = _spans(factors, max(_SPAN * size, _FEWEST))
    inner = [((A @ Q).float(), (P.T @ B).float()) for A, B in _units(factors)]  # [r, s] and [s, r]
    gram = _gram((A.T, B.T @ B) for A, B in _doubled(inner))  # [s, s]
    (V, _), whole, before = _top(gram, size), float(gram.trace()), float("-inf")
    U = V
    for _ in range(rounds):
        U, _ = _top(_gram((B, _square(A @ V)) for A, B in _doubled(inner)), size)
        V, kept = _top(_gram((A.T, _square(B.T @ U)) for A, B in _doubled(inner)), size)
        if kept - before < tolerance * whole:
            break
        before = kept
    return Basis((P @ U).float().contiguous(), (Q @ V).float().contiguous())


def halves(basis: Basis, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """a [r, c] = A V and b [c, r] = U^T B, float32: S = b a is the core that is nearest to the delta of an adapter.
    They are a LoRA themselves, of what U and V leave of a module, and where r is far below c less than S.

    Args:
        A, B: [r, in] and [out, r], the scale in B. Of more than c ranks there remain c.
    """
    a, b = A.double() @ basis.V.double(), basis.U.double().T @ B.double()
    if len(a) > a.shape[1]:
        a, b = torch.eye(a.shape[1], dtype=a.dtype), b @ a
    return a.float(), b.float()


def residual(basis: Basis, core: Tensor, A: Tensor, B: Tensor) -> float:
    """||Delta - U S V^T||_F / ||Delta||_F, Delta = B A, S = ``core`` [c, c]; 0.0 where Delta is zero."""
    whole = squared(A, B)
    return float((lost(basis, core, A, B) / whole) ** 0.5) if whole else 0.0


def lost(basis: Basis, core: Tensor, A: Tensor, B: Tensor) -> float:
    """||Delta - U S V^T||_F^2, in float64: ||Delta||^2 - ||S||^2 where U and V are orthonormal and S is the nearest
    core, and as exact for what was rounded since."""
    S, (left, right) = core.double(), basis.grams
    crossed = (S * _exact_core(basis, A, B)).sum()
    return max(0.0, squared(A, B) - 2 * float(crossed) + float((S * (left @ S @ right)).sum()))


def squared(A: Tensor, B: Tensor) -> float:
    """||B A||_F^2 = <B^T B, A A^T>, in float64."""
    left, right = _square(B.double().T), _square(A.double())
    found = float((left * right).sum())
    return found if found > _CANCELLED * float(left.trace() * right.trace()) else 0.0


def _exact_core(basis: Basis, A: Tensor, B: Tensor) -> Tensor:
    return (basis.U.double().T @ B.double()) @ (A.double() @ basis.V.double())


def _units(factors: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each adapter's factors in float64, the delta's norm 1 or 0."""
    for A, B in factors():
        norm = squared(A, B) ** 0.5
        yield A.double(), B.double() / norm if norm else torch.zeros_like(B, dtype=torch.float64)


def _spans(factors: Callable[[], Iterable[tuple[Tensor, Tensor]]], width: int) -> tuple[Tensor, Tensor]:
    """Orthonormal P [out, s] and Q [in, s], s at most ``width``: nearly the deltas' top directions, left and right."""
    generator = torch.Generator().manual_seed(0)
    P: Tensor | None = None
    Q: Tensor | None = None
    for _ in range(2):
        left: Tensor | None = None
        for A, B in _units(factors):
            if P is None or Q is None:
                sizes = [(size, min(size, width)) for size in (len(B), A.shape[1])]
                P, Q = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
            if left is None:
                left, right = torch.zeros_like(P), torch.zeros_like(Q)
            left.addmm_(B, _square(A) @ (B.T @ P))
            right.addmm_(A.T, _square(B.T) @ (A @ Q))
        if left is None:
            raise DataError("There are no adapters to fit a basis to: give at least one.")
        P, Q = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    assert P is not None and Q is not None
    return P, Q


def _doubled(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for A, B in pairs:
        yield A.double(), B.double()


def _square(X: Tensor) -> Tensor:
    return X @ X.T


def _gram(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """sum of X M X^T, [d, d]; X [d, r], M [r, r]."""
    total: Tensor | None = None
    for X, M in terms:
        if total is None:
            total = X.new_zeros(len(X), len(X))
        total.addmm_(X @ M, X.T)
    assert total is not None
    return total


def _top(gram: Tensor, size: int) -> tuple[Tensor, float]:
    """The top eigenvectors [d, at most size], the largest first, and the sum of their eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    count = min(size, max(1, int((values > _NOTHING * values[-1]).sum())))
    return vectors[:, -count:].flip(1), float(values[-count:].sum())
