"""Pieces whose weights a person's history teaches.

The gates choose and weigh by what enters a module, which is much the same for all who ask the same kind of thing; the
answers are what people differ in, and only a loss sees them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.factors import Factors
from molora.personalize.generated import Generated, generated, stacked
from molora.personalize.pieces import TOP, Assembled, PiecePool
from molora_training.data import Encoded
from molora_training.side_by_side import Schedule, learn, picked

FIT = Schedule(learning_rate=0.15, epochs=4, batch_tokens=512)


def drawn(pool: PiecePool, top: int = TOP) -> Assembled:
    """Pieces by chance, others in each module, with weights of zero: what fitted weights begin with, whoever asks."""
    chance, sharers = torch.Generator().manual_seed(0), pool.config.sharers
    places = torch.stack([torch.randperm(sharers, generator=chance)[:top] for _ in pool.config.modules])
    return Assembled(places.to(torch.int16), torch.zeros(places.shape, dtype=torch.float16))


def fit_weights(
    base: Any,
    pool: PiecePool,
    chosen: Sequence[Assembled],
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    how: Schedule = FIT,
    below: Factors | None = None,
) -> list[Assembled]:
    """The same pieces with weights that each person's history has taught, of any sign and sum; side by side.

    Args:
        base: frozen, on any device.
        chosen: of each person, with the weights to begin with.
        rows: conversations of each person.
        pad_id: of the tokenizer.
        how: the schedule.
        below: what acts beneath the pieces.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    pieces = _unweighted(pool, [one.places for one in chosen], base.device)
    beneath = stacked([] if below is None else [below], base.device)
    own = [
        {
            name: (nn.Parameter(begin.float().to(base.device)),)
            for name, begin in zip(pool.config.modules, one.weights, strict=True)
        }
        for one in chosen
    ]

    @contextmanager
    def act(of: Tensor | None, now: Mapping[str, tuple[Tensor, ...]]) -> Iterator[None]:
        weights = {name: some for name, (some,) in now.items()}
        with generated(base, beneath), generated(base, _weighed(picked(pieces, of), weights)):
            yield

    learn(base, own, rows, pad_id, how, act)
    return [
        replace(one, weights=torch.stack([some.detach().cpu().half() for (some,) in learnt.values()]))
        for one, learnt in zip(chosen, own, strict=True)
    ]


def _unweighted(pool: PiecePool, places: Sequence[Tensor], device: torch.device) -> Generated:
    """Pieces with weights of one, a row for each choice of places."""
    return stacked([pool.factors(Assembled(some, torch.ones(some.shape))) for some in places], device)


def _weighed(pieces: Generated, weights: Mapping[str, Tensor]) -> Generated:
    """Each piece times its weight [B, top]: a piece is as many columns of B as it has ranks."""
    return {
        name: (A, B * weights[name].repeat_interleave(B.shape[2] // weights[name].shape[1], 1).unsqueeze(1))
        for name, (A, B) in pieces.items()
    }
