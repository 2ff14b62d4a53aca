"""Adapters of several users that learn in one loop: each sequence of a batch is under its own user's.

Every user has moments, an order, a schedule and a clipping of their own: what becomes of one's adapter does not depend
on who else learns, but for rounding.
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
    abreast = _Abreast(own, how)
    losses = TokenLosses(base)
    plans = [
        plan_steps([row.input_ids.numel() for row in some], how.batch_tokens, how.epochs, how.seed) for some in rows
    ]
    for number, shares in enumerate(zip_longest(*plans)):
        here = [user for user, share in enumerate(shares) if share is not None]
        picks = [rows[user][index] for user in here for index in shares[user]]
        of = torch.tensor([user for user in here for _ in shares[user]], device=base.device)
        batch = collate(picks, pad_id).to(base.device)
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        owners = of if len(own) > 1 else None
        with act(owners, abreast.rows(owners)):
            each = losses(
                lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                labels,
            )
        sums, counts = (
            torch.zeros(len(own), device=base.device).index_add(0, of, some)
            for some in (each.sum(1), (labels != IGNORED).sum(1).float())
        )
        by_user = sums / counts.clamp_min(1)
        by_user.sum().backward()
        rates = [
            warm_cosine(number, len(plan), how.warmup, how.learning_rate) if number < len(plan) else 0.0
            for plan in plans
        ]
        norms = abreast.step(rates)
        for loss, norm in torch.stack([by_user.detach(), norms], 1)[here].tolist():
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(f"The loss became {loss} at step {number + 1}, its gradient {norm}.")
    abreast.hand_back()


class _Abreast:
    """What users own, a row for each, under one AdamW that steps as ``torch.optim``'s, an optimizer for each, would:
    their number costs no launches. All begin together, so that they count the same steps."""

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, own: Sequence[Own], how: Schedule) -> None:
        self.own, self.how, self.steps = own, how, 0
        self.flat = torch.stack([torch.cat([p.detach().flatten() for p in _every(one, own[0])]) for one in own])
        self.flat.requires_grad_()
        self.mean, self.square = torch.zeros_like(self.flat.detach()), torch.zeros_like(self.flat.detach())
        self.sizes = [p.numel() for p in _every(own[0], own[0])]

    def rows(self, owners: Tensor | None) -> dict[str, tuple[Tensor, ...]]:
        """What each sequence's user owns; of one user a row for all."""
        pieces = iter(self.flat.split(self.sizes, 1))
        found = {}
        for name, parts in self.own[0].items():
            own = [next(pieces) for _ in parts]
            some = own if owners is None else [piece.index_select(0, owners) for piece in own]
            found[name] = tuple(piece.unflatten(1, part.shape) for piece, part in zip(some, parts, strict=True))
        return found

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> Tensor:
        """With a learning rate for each user, 0 of those who are through; the norms [users] of their gradients."""
        assert self.flat.grad is not None
        slope, self.flat.grad, self.steps = self.flat.grad, None, self.steps + 1
        norms = slope.norm(dim=1)
        slope.mul_((self.how.clip_norm / (norms + 1e-6)).clamp_max(1).unsqueeze(1))
        self.mean.lerp_(slope, 1 - self.BETAS[0])
        self.square.mul_(self.BETAS[1]).addcmul_(slope, slope, value=1 - self.BETAS[1])
        first, second = (1 - beta**self.steps for beta in self.BETAS)
        rate = torch.tensor(rates, device=slope.device).unsqueeze(1)
        self.flat.mul_(1 - rate * self.how.weight_decay)
        self.flat.sub_(rate / first * self.mean / ((self.square / second).sqrt_() + self.EPS))
        return norms

    @torch.no_grad()
    def hand_back(self) -> None:
        """Writes what was learnt into the users' own parameters."""
        for one, flat in zip(self.own, self.flat, strict=True):
            for parameter, piece in zip(_every(one, self.own[0]), flat.split(self.sizes), strict=True):
                parameter.copy_(piece.view_as(parameter))


def _every(one: Own, like: Own) -> list[nn.Parameter]:
    """In the order of another's modules."""
    return [parameter for name in like for parameter in one[name]]


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
