"""Groups of adapters that are alike, so that each group can have bases of its own (arXiv 2407.00066).

Alike means: of the same output and input directions. A delta's sketch is P^T Delta Delta^T P beside Q^T Delta^T Delta Q
with fixed random P [out, p] and Q [in, p]; a sketch of Delta itself would part adapters of one basis whose cores
differ in sign.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from molora.errors import ConfigError

WIDTH = 8  # p
_TRIES = 8  # of which the tightest grouping counts


def sketch(module: str, factors: Iterable[tuple[Tensor, Tensor] | None], seed: int = 0) -> Tensor:
    """One module's part of every adapter's signature: float32 [adapters, p (p + 1)], of norm 1; 0 where there is none.

    Args:
        module: its name, for which P and Q are drawn.
        factors: of each adapter A [r, in] and B [out, r], the scale in B, or None where it has no such module.
        seed: of P and Q.
    """
    digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rows, columns = torch.triu_indices(WIDTH, WIDTH)
    P: Tensor | None = None
    found = []
    for pair in factors:
        if pair is None:
            found.append(torch.zeros(2 * len(rows)))
            continue
        A, B = pair[0].float(), pair[1].float()
        if P is None:
            P, Q = torch.randn(len(B), WIDTH, generator=generator), torch.randn(A.shape[1], WIDTH, generator=generator)
        out, inner = P.T @ B, A @ Q  # [p, r] and [r, p]
        parts = (out @ (A @ A.T) @ out.T, inner.T @ (B.T @ B) @ inner)
        found.append(torch.cat([_unit(part[rows, columns]) for part in parts]) / 2**0.5)
    return torch.stack(found)


def group(signatures: Tensor, count: int, seed: int = 0, rounds: int = 100) -> list[int]:
    """k-means (Lloyd's, from the seeds of k-means++) in Euclidean distance; the same for the same seed.

    Args:
        signatures: float [adapters, features]; sketches side by side.
        count: the most groups; there are fewer where a group would be empty, as with adapters that are the same.
        seed: of the first centres.
        rounds: the most of each try.

    Returns:
        Each adapter's group, numbered from 0 in the order in which they come.

    Raises:
        ConfigError: there are fewer adapters than groups, or no group.
    """
    if not 1 <= count <= len(signatures):
        raise ConfigError(f"{len(signatures)} adapters cannot be in {count} groups: ask for 1 to {len(signatures)}.")
    generator = torch.Generator().manual_seed(seed)
    _, labels = min((_lloyd(signatures, count, generator, rounds) for _ in range(_TRIES)), key=lambda one: one[0])
    order = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]


def _lloyd(points: Tensor, count: int, generator: torch.Generator, rounds: int) -> tuple[float, list[int]]:
    """The sum of squared distances to the centres, and each point's centre."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        nearest = _distances(points, centres).amin(1).square()
        if not nearest.any():
            break  # there are no more that differ
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator)]])
    labels = _distances(points, centres).argmin(1)
    for _ in range(rounds):
        centres = torch.stack([points[labels == label].mean(0) for label in labels.unique()])
        before, labels = labels, _distances(points, centres).argmin(1)
        if torch.equal(labels, before):
            break
    return float(_distances(points, centres).amin(1).square().sum()), labels.tolist()


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")  # the same: exactly 0


def _unit(row: Tensor) -> Tensor:
    norm = row.norm()
    return row / norm if norm > 0 else row
