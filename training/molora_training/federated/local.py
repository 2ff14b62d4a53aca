"""What a client does with its own conversations: learn from the factors that it got, or tell their loss."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molora.personalize.generated import Generated, generated
from molora_training.batches import plan_pass
from molora_training.data import IGNORED, Encoded, collate
from molora_training.federated.lora import Lora
from molora_training.federated.settings import LocalSettings
from molora_training.side_by_side import Schedule, learn
from molora_training.token_losses import TokenLosses


def acting(lora: Lora, device: torch.device | str) -> Generated:
    """The factors as they act in a base: one row for all sequences, the scale in B."""
    return {name: (a.to(device)[None], lora.scale * b.to(device)[None]) for name, (a, b) in lora.pairs.items()}


def drawn(rows: Sequence[Encoded], count: int, seed: str) -> list[Encoded]:
    """``count`` of them, or all if there are fewer."""
    order = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in order]


def train(
    base: Any, pad_id: int, lora: Lora, rows: Sequence[Encoded], how: LocalSettings, seed: int, frozen_a: bool = False,
    below: Lora | None = None,
) -> Lora:  # fmt: skip
    """Learns by backpropagation, AdamW and a cosine schedule, as adapters of many users do side by side.

    Args:
        base: frozen, on any device.
        lora: what it goes on from.
        frozen_a: B alone learns.
        below: what acts beneath and stays.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    device = base.device
    start = {name: (a.to(device).clone(), b.to(device).clone()) for name, (a, b) in lora.pairs.items()}
    own = {name: tuple(map(nn.Parameter, (b,) if frozen_a else (a, b))) for name, (a, b) in start.items()}
    beneath = acting(below, device) if below is not None else {}

    @contextmanager
    def act(_: Tensor | None, now: Mapping[str, tuple[Tensor, ...]]) -> Iterator[None]:
        pairs = {name: (start[name][0][None], parts[0]) if frozen_a else parts for name, parts in now.items()}
        with generated(base, beneath), generated(base, {name: (a, lora.scale * b) for name, (a, b) in pairs.items()}):
            yield

    schedule = Schedule(how.learning_rate, how.epochs, how.batch_tokens, warmup=0.0, seed=seed)
    learn(base, [own], [rows], pad_id, schedule, act)
    learnt = {name: tuple(part.detach().cpu() for part in parts) for name, parts in own.items()}
    return Lora(
        {n: (start[n][0].cpu(), parts[0]) if frozen_a else (parts[0], parts[1]) for n, parts in learnt.items()},
        lora.scale,
    )


@torch.no_grad()
def loss(
    base: Any, pad_id: int, lora: Lora | None, rows: Sequence[Encoded], below: Lora | None = None
) -> tuple[float, int]:
    """Nats summed over the answers of ``rows``, and how many tokens those are."""
    with generated(base, acting(below, base.device) if below is not None else {}):
        return summed_loss(base, TokenLosses(base), pad_id, acting(lora, base.device) if lora is not None else {}, rows)


@torch.no_grad()
def summed_loss(
    base: Any, losses: TokenLosses, pad_id: int, factors: Generated, rows: Sequence[Encoded], batch_tokens: int = 2048
) -> tuple[float, int]:
    """As :func:`loss`, with factors that are in their places already."""
    total, count = 0.0, 0
    with generated(base, factors):
        for indices in plan_pass([row.input_ids.numel() for row in rows], batch_tokens):
            batch = collate([rows[index] for index in indices], pad_id).to(base.device)
            labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
            each = losses(
                lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                labels,
            )
            total += float(each.double().sum())
            count += int((labels != IGNORED).sum())
    return total, count
