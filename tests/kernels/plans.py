"""Plans of every popularity, shared by the tests of this folder."""

import torch

from tests.conftest import DEVICE

SLOTS = 6


def make_slots(kind: str, T: int, S: int = 2, seed: int = 0) -> torch.Tensor:
    """[T, S] int64: S different slots a token out of SLOTS, -1 for none, by how popular each slot is."""
    return _slots(kind, T, S, torch.Generator().manual_seed(seed)).to(DEVICE)


def _slots(kind: str, T: int, S: int, generator: torch.Generator) -> torch.Tensor:
    popularity = {
        "identical": torch.eye(SLOTS)[2] + torch.eye(SLOTS)[4],
        "distinct": torch.ones(SLOTS),
        "uniform": torch.ones(SLOTS),
        "zipf": 1 / torch.arange(1, SLOTS + 1).float(),
        "skewed": torch.tensor([100.0, 1, 1, 1, 1, 1]),
        "empty slots": torch.tensor([1.0, 0, 1, 0, 0, 1]),
        "all -1": torch.ones(SLOTS),
    }[kind]
    if kind == "all -1":
        return torch.full((T, S), -1)
    if kind == "distinct":
        return (torch.arange(T).unsqueeze(1) * S + torch.arange(S)) % SLOTS
    slots = torch.multinomial(popularity.expand(T, -1), S, generator=generator)
    if kind == "identical":
        return slots.sort(-1).values
    return slots.masked_fill(torch.rand(T, S, generator=generator) < 0.2, -1)


KINDS = ["identical", "distinct", "uniform", "zipf", "skewed", "empty slots", "all -1"]
