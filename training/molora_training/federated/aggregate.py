"""What the server makes of its clients' factors: exact sums of their deltas, and the mean of factors, which is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from molora.errors import ConfigError
from molora_training.federated.lora import Lora, Pair


@dataclass
class DeltaSum:
    """Sum of w_k (alpha_k / r_k) B_k A_k, taken client by client and kept as factors.

    Where ranks beside each other outgrow the module's smaller side, they are multiplied out, and the identity stands
    for the other factor: nothing is lost, and memory does not grow with the number of clients.
    """

    stacked: dict[str, Pair] = field(default_factory=dict)

    def add(self, factors: Lora, weight: float) -> None:
        """Another client's, float64 from here on. ``weight`` may be negative: then it is taken away."""
        for name, (a, b) in factors.pairs.items():
            wide, tall = a.double(), weight * factors.scale * b.double()
            if name in self.stacked:
                wide = torch.cat([self.stacked[name][0], wide])
                tall = torch.cat([self.stacked[name][1], tall], 1)
            self.stacked[name] = _narrowed(wide, tall)

    def exact(self) -> Lora:
        """As it is, at scale 1: ranks concatenated."""
        return Lora({name: (a.float(), b.float()) for name, (a, b) in self.stacked.items()}, 1.0)

    def cut(self, rank: int, scale: float, seed: int = 0) -> Lora:
        """The nearest adapter of a rank: B = U S / scale, A = V^T of the sum's largest singular values.

        FlexLoRA's redistribution (arXiv 2402.11505, section 3): a client of rank r takes the first r of these. Ranks
        that the sum does not have get rows of A as PEFT draws them and columns of zeros, which can still learn.
        """
        found = {}
        for number, (name, (wide, tall)) in enumerate(self.stacked.items()):
            # tall wide = Q_b (R_b R_a^T) Q_a^T: only the small core is decomposed.
            q_b, r_b = torch.linalg.qr(tall)
            q_a, r_a = torch.linalg.qr(wide.T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            kept = int((s[:rank] > s[0] * torch.finfo(torch.float32).eps).sum())
            a, b = vh[:kept] @ q_a.T, q_b @ u[:, :kept] * s[:kept] / scale
            fresh = _drawn(rank - kept, wide.shape[1], seed * 1_000_003 + number).double()
            b = torch.nn.functional.pad(b, (0, rank - kept))
            found[name] = torch.cat([a, fresh]).float(), b.float()
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


def _narrowed(wide: torch.Tensor, tall: torch.Tensor) -> Pair:
    """The same product with no more ranks than its smaller side. wide: [rank, in]. tall: [out, rank]."""
    rows, columns = len(tall), wide.shape[1]
    if len(wide) <= min(rows, columns):
        return wide, tall
    if rows <= columns:
        return tall @ wide, torch.eye(rows, dtype=wide.dtype)
    return torch.eye(columns, dtype=wide.dtype), tall @ wide


def _drawn(ranks: int, width: int, seed: int) -> torch.Tensor:
    """Rows of A [ranks, width] as PEFT draws them (kaiming_uniform_ with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return (2 * torch.rand(ranks, width, generator=generator) - 1) / width**0.5
