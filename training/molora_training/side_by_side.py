"""Adapters of several users that learn in one loop: each sequence of a batch is under its own user's.

Every user has an optimizer, an order, a schedule and a clipping of their own: what becomes of one's adapter does not
depend on who else learns, but for rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from molora.checks import linear_sizes
from molora.errors import ConfigError, NonFiniteError
from molora.factors import Factors
from molora.personalize.generated import Generated, generated, stacked
from molora_training.batches import plan_steps
from molora_training.data import IGNORED, Encoded, collate
from molora_training.schedule import warm_cosine
from molora_training.token_losses import TokenLosses

Own = Mapping[str, tuple[nn.Parameter, ...]]
"""What learns of one user, by module."""

Act = Callable[[Tensor | None, Mapping[str, tuple[Tensor, ...]]], AbstractContextManager[None]]
"""Makes the base act for a batch: of whom each sequence is (int64 [B], None: there is one user), and what learns, with
a row for each sequence, or one for all."""


@dataclass(frozen=True)
class Schedule:
    """How each user's adapter learns. batch_tokens: padded tokens in one user's share of a step. warmup: share of the
    steps. seed: of the order, and of what an adapter begins with."""

    learning_rate: float = 1e-4
    epochs: int = 2
    batch_tokens: int = 512
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0


ON_TOP = Schedule(learning_rate=5e-5, epochs=1, batch_tokens=2048)
"""Of a small adapter on top of generated factors (Merge-then-Adapt, arXiv 2511.20072, stage 3), as in its code."""


def train_adapters(
    base: Any,
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    how: Schedule,
    modules: Sequence[str],
    rank: int = 8,
    alpha: float | None = None,
    below: Sequence[Factors] = (),
) -> list[Factors]:
    """One adapter for each user, side by side.

    Args:
        base: frozen, on any device.
        rows: conversations of each user.
        pad_id: of the tokenizer.
        how: the schedule.
        modules: names in the base.
        rank, alpha: of each adapter; no alpha: the rank.
        below: what acts beneath and stays: one for all users, or one for each.

    Returns:
        The adapters alone, in the users' order: float32, on the CPU, the scale in B.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    scale = (rank if alpha is None else alpha) / rank
    own = [_new(base, modules, rank, how.seed) for _ in rows]
    beneath = stacked(below, base.device)

    @contextmanager
    def act(of: Tensor | None, now: Mapping[str, tuple[Tensor, ...]]) -> Iterator[None]:
        fixed = picked(beneath, of) if len(below) > 1 else beneath
        with generated(base, fixed), generated(base, {name: (A, B * scale) for name, (A, B) in now.items()}):
            yield

    learn(base, own, rows, pad_id, how, act)
    return [{name: (A.detach().cpu(), B.detach().cpu() * scale) for name, (A, B) in one.items()} for one in own]


def learn(
    base: Any, own: Sequence[Own], rows: Sequence[Sequence[Encoded]], pad_id: int, how: Schedule, act: Act
) -> None:
    """Trains what each user owns, in place, on that user's rows.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    every = [[p for parts in one.values() for p in parts] for one in own]
    optimizers = [torch.optim.AdamW(some, how.learning_rate, weight_decay=how.weight_decay) for some in every]
    losses = TokenLosses(base)
    plans = [
        plan_steps([row.input_ids.numel() for row in some], how.batch_tokens, how.epochs, how.seed) for some in rows
    ]
    for number, shares in enumerate(zip_longest(*plans)):
        here = [user for user, share in enumerate(shares) if share is not None]
        picks = [rows[user][index] for user in here for index in shares[user]]
        of = torch.tensor([place for place, user in enumerate(here) for _ in shares[user]])
        batch = collate(picks, pad_id).to(base.device)
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        owners = of.to(base.device) if len(own) > 1 else None
        with act(None if owners is None else torch.tensor(here, device=base.device)[owners], _rows(own, here, owners)):
            each = losses(
                lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                labels,
            )
        sums, counts = (
            torch.zeros(len(here), device=base.device).index_add(0, of.to(base.device), some)
            for some in (each.sum(1), (labels != IGNORED).sum(1).float())
        )
        by_user = sums / counts.clamp_min(1)
        for user in here:
            optimizers[user].zero_grad(set_to_none=True)
        by_user.sum().backward()
        norms = torch.stack([nn.utils.clip_grad_norm_(every[user], how.clip_norm) for user in here])
        for user, loss, norm in zip(here, by_user.tolist(), norms.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(f"The loss became {loss} at step {number + 1}, its gradient {norm}.")
            for group in optimizers[user].param_groups:
                group["lr"] = warm_cosine(number, len(plans[user]), how.warmup, how.learning_rate)
            optimizers[user].step()


def module_names(base: Any, targets: Sequence[str]) -> list[str]:
    """The linear modules of a base whose names end so.

    Raises:
        ConfigError: none does.
    """
    found = [name for name in linear_sizes(base) if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not found:
        raise ConfigError(f"The base has no linear module that ends with {' or '.join(targets)}.")
    return found


def picked(some: Generated, of: Tensor | None) -> Generated:
    """Users' factors, a row for each sequence."""
    return some if of is None else {name: (A[of], B[of]) for name, (A, B) in some.items()}


def _rows(own: Sequence[Own], here: Sequence[int], owners: Tensor | None) -> dict[str, tuple[Tensor, ...]]:
    found = {}
    for name, parts in own[0].items():
        joined = [torch.stack([own[user][name][part] for user in here]) for part in range(len(parts))]
        found[name] = tuple(joined if owners is None else [some[owners] for some in joined])
    return found


def _new(base: Any, modules: Sequence[str], rank: int, seed: int) -> dict[str, tuple[nn.Parameter, ...]]:
    """As PEFT begins: A uniform, B zero."""
    chance = torch.Generator().manual_seed(seed)
    found, sizes = {}, linear_sizes(base)
    for name in modules:
        inside, outside = sizes[name]
        A = (torch.rand(rank, inside, generator=chance) * 2 - 1) * inside**-0.5
        B = torch.zeros(outside, rank)
        found[name] = tuple(nn.Parameter(start.to(base.device)) for start in (A, B))
    return found
