"""Pieces by what a person's history says of them: the slope of its loss chooses, and its loss sets the weights.

The gates choose by what enters a module, which is much the same for all who ask the same kind of thing; the answers are
what people differ in, and only a loss sees them.
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
from molora_training.batches import plan_steps
from molora_training.data import IGNORED, Encoded, collate
from molora_training.side_by_side import Schedule, learn, picked
from molora_training.token_losses import TokenLosses

FIT = Schedule(learning_rate=5e-2, epochs=2, batch_tokens=512)


def steepest(
    base: Any,
    pool: PiecePool,
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    below: Factors | None = None,
    top: int = TOP,
    batch_tokens: int = FIT.batch_tokens,
) -> list[Assembled]:
    """Of each person and module the pieces by whose weight, at zero, the loss of the answers changes most; weights of
    zero.

    Args:
        base: frozen, on any device.
        rows: conversations of each person.
        pad_id: of the tokenizer.
        below: what acts beneath the pieces.
        top: pieces of each module.
        batch_tokens: padded ones in one forward.
    """
    device, modules, sharers = base.device, pool.config.modules, pool.config.sharers
    pieces = _unweighted(pool, [torch.arange(sharers).expand(len(modules), -1)], device)
    beneath = stacked([] if below is None else [below], device)
    losses = TokenLosses(base)
    found = []
    for some in rows:
        weights = {name: torch.zeros(1, sharers, device=device, requires_grad=True) for name in modules}
        for indices in plan_steps([row.input_ids.numel() for row in some], batch_tokens, 1, 0):
            batch = collate([some[index] for index in indices], pad_id).to(device)
            labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
            with generated(base, beneath), generated(base, _weighed(pieces, weights)):
                each = losses(
                    lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                    labels,
                )
            each.sum().backward()
        slopes = torch.cat([weights[name].grad for name in modules]).cpu()  # type: ignore[misc]
        places = slopes.abs().topk(min(top, sharers)).indices
        found.append(Assembled(places.to(torch.int16), torch.zeros(places.shape, dtype=torch.float16)))
    return found


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
