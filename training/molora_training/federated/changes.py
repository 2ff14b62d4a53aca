"""What clients changed of an adapter's factors: of B alone, as vectors and sums, and of both, at smaller ranks."""

from collections.abc import Sequence

import torch

from molora.errors import FederationError
from molora_training.federated.lora import Lora


def b_vector(before: Lora, after: Lora, rank: int) -> torch.Tensor:
    """What was changed of B, filled up to the server's rank: float32 [entries of B]."""
    changes = [b - before.pairs[name][1] for name, (_, b) in sorted(after.pairs.items())]
    return torch.cat([torch.nn.functional.pad(change, (0, rank - change.shape[1])).flatten() for change in changes])


def from_vector(vector: torch.Tensor, like: Lora) -> dict[str, torch.Tensor]:
    """The other way round: by module [out, rank].

    Raises:
        FederationError: it is of another length.
    """
    size = sum(b.numel() for _, b in like.pairs.values())
    if vector.shape != (size,):
        raise FederationError(
            f"The sum of the updates is {list(vector.shape)}, and the adapter's B has {size} entries."
        )
    parts = vector.split([b.numel() for _, (_, b) in sorted(like.pairs.items())])
    return {name: part.view_as(b) for part, (name, (_, b)) in zip(parts, sorted(like.pairs.items()), strict=True)}


def beside(mean: Lora, before: Lora) -> Lora:
    """The mean of factors, with the ranks that nobody of this round has as they were."""
    pairs = {}
    for name, (a, b) in mean.pairs.items():
        a0, b0 = before.pairs[name]
        pairs[name] = torch.cat([a, a0[len(a) :]]), torch.cat([b, b0[:, b.shape[1] :]], 1)
    return Lora(pairs, mean.scale)


def b_sum(before: Lora, updates: Sequence[Lora]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([one.pairs[name][1] - b for one in updates]).sum(0) for name, (_, b) in before.pairs.items()
    }
