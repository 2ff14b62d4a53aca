"""What the server makes of its clients' factors: exact sums of their deltas, and the mean of factors, which is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from molora.errors import ConfigError
from molora_training.federated.lora import Lora, Pair

_LEAST = 1e-6  # of the largest singular value: what is smaller is rounding


@dataclass
class DeltaSum:
    """Sum of w_k (alpha_k / r_k) B_k A_k, taken client by client.

    Of a module the factors stand beside each other, A [ranks, in] and B [out, ranks], until they would outgrow its
    smaller side; then the sum is kept as it is, [out, in]. Nothing is lost, and memory does not grow with the number
    of clients. float64.
    """

    stacked: dict[str, Pair] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, lora: Lora, weight: float) -> None:
        """Another client's. ``weight`` may be negative: then it is taken away."""
        for name, (a, b) in lora.pairs.items():
            wide, tall = a.double(), weight * lora.scale * b.double()
            if name in self.dense:
                self.dense[name].addmm_(tall, wide)
                continue
            if name in self.stacked:
                wide = torch.cat([self.stacked[name][0], wide])
                tall = torch.cat([self.stacked[name][1], tall], 1)
            if len(wide) <= min(len(tall), wide.shape[1]):
                self.stacked[name] = wide, tall
            else:
                self.stacked.pop(name, None)
                self.dense[name] = tall @ wide

    def exact(self) -> Lora:
        """As it is, at scale 1: ranks concatenated, or of a dense sum the identity for one of the factors."""
        found = dict(self.stacked)
        for name, whole in self.dense.items():
            rows, columns = whole.shape
            one = torch.eye(min(rows, columns), dtype=whole.dtype)
            found[name] = (whole, one) if rows <= columns else (one, whole)
        return Lora({name: (a.float(), b.float()) for name, (a, b) in found.items()}, 1.0)

    def cut(self, rank: int, scale: float, seed: int = 0) -> Lora:
        """The nearest adapter of a rank: B = U S / scale, A = V^T of the sum's largest singular values.

        FlexLoRA's redistribution (arXiv 2402.11505): a client of rank r takes the first r of these. Ranks
        that the sum does not have get rows of A as PEFT draws them and columns of zeros, which can still learn.
        """
        found = {}
        for number, name in enumerate([*self.stacked, *self.dense]):
            u, s, vh = _of_factors(*self.stacked[name]) if name in self.stacked else _of_dense(self.dense[name])
            kept = int((s[:rank] > _LEAST * s[0]).sum())
            fresh = _drawn(rank - kept, vh.shape[1], seed * 1_000_003 + number).double()
            b = torch.nn.functional.pad(u[:, :kept] * s[:kept] / scale, (0, rank - kept))
            found[name] = torch.cat([vh[:kept], fresh]).float(), b.float()
        return Lora(found, scale)


def mean_of_factors(updates: Sequence[tuple[Lora, float]]) -> Lora:
    """FedAvg on A and B apart (as FedIT, arXiv 2305.05644): the naive form, whose product has the terms B_i A_j too.

    Smaller ranks are filled up with zeros to the largest.
    """
    if not updates:
        raise ConfigError("There is no update to take the mean of.")
    scales = {factors.scale for factors, _ in updates}
    if len(scales) > 1:
        raise ConfigError("Lora of different scales have no mean.")
    rank = max(factors.rank for factors, _ in updates)
    sums: dict[str, Pair] = {}
    for factors, weight in updates:
        for name, (a, b) in factors.pairs.items():
            spare = rank - len(a)
            wide = weight * torch.nn.functional.pad(a.double(), (0, 0, 0, spare))
            tall = weight * torch.nn.functional.pad(b.double(), (0, spare))
            before = sums.get(name)
            sums[name] = (wide, tall) if before is None else (before[0] + wide, before[1] + tall)
    return Lora({name: (a.float(), b.float()) for name, (a, b) in sums.items()}, scales.pop())


def shares(examples: Mapping[str, int]) -> dict[str, float]:
    """p_k: what each client's update weighs, by its number of examples."""
    total = sum(examples.values())
    return {client: count / total for client, count in examples.items()}


def _of_factors(wide: torch.Tensor, tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and V^T of tall wide = Q_b (R_b R_a^T) Q_a^T: only the small core is decomposed."""
    q_b, r_b = torch.linalg.qr(tall)
    q_a, r_a = torch.linalg.qr(wide.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vh @ q_a.T


def _of_dense(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and V^T of its smaller side's Gram matrix, a fraction of an SVD's time: in float64 what that costs is far
    below the float32 of what comes out."""
    if len(whole) > whole.shape[1]:
        u, s, vh = _of_dense(whole.T)
        return vh.T, s, u.T
    squares, vectors = torch.linalg.eigh(whole @ whole.T)
    u, s = vectors.flip(1), squares.clamp_min(0).sqrt().flip(0)
    kept = s > _LEAST * s[0]
    u, s = u[:, kept], s[kept]
    if not len(s):
        u, s = vectors[:, :1], squares[:1] * 0
    return u, s, u.T @ whole / s.clamp_min(1e-300)[:, None]


def _drawn(ranks: int, width: int, seed: int) -> torch.Tensor:
    """Rows of A [ranks, width] as PEFT draws them (kaiming_uniform_ with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return (2 * torch.rand(ranks, width, generator=generator) - 1) / width**0.5
