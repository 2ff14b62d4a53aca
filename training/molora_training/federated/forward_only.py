"""Learning without backpropagation: slopes along random directions, from two forward passes each.

FwdLLM (arXiv 2308.13894). With theta what learns and v ~ N(0, I):

    d = (L(theta + h v) - L(theta - h v)) / 2h,    g = mean of d v over the directions of a step

- of ten times as many directions those are taken that are most like the gradient before
- directions are added until the two halves of them agree on the gradient, or there are MOST
- a direction is known by its seed, and made again when it is needed: there is never more than one of them, no graph of
  operations, and no optimizer state but the gradient before
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.errors import NonFiniteError
from molora.personalize.generated import generated
from molora_training.batches import plan_steps
from molora_training.data import Encoded
from molora_training.federated.local import acting, summed_loss
from molora_training.federated.lora import Lora
from molora_training.federated.settings import LocalSettings
from molora_training.schedule import warm_cosine
from molora_training.token_losses import TokenLosses

STEP = 0.01  # h
CANDIDATES = 10  # directions that are looked at for each that is taken
FEWEST, MOST = 4, 16  # directions of a step
AT_ONCE = 512  # padded tokens of a pass: a loss is a sum, so small passes give the same with less memory
AGREED = 1.0  # how far apart the halves' gradients may be, over how long their mean is


@dataclass(frozen=True)
class Estimate:
    """A gradient [n] from ``directions`` of them. spread: the halves' distance over their mean's length."""

    gradient: Tensor
    directions: int
    spread: float


def direction(seed: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """v ~ N(0, I) [size], the same for the same seed on the same kind of device."""
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device)


def alike(seeds: Sequence[int], size: int, wanted: Tensor | None, count: int) -> list[int]:
    """The ``count`` seeds whose directions have the largest cosine with ``wanted``; without that, the first."""
    if wanted is None:
        return list(seeds[:count])
    return sorted(seeds, key=lambda seed: -float(_cosine(direction(seed, size, wanted.device), wanted)))[:count]


def gradient(
    loss: Callable[[Tensor], float], theta: Tensor, before: Tensor | None, seed: int, agreed: float = AGREED
) -> Estimate:
    """Estimates the gradient of ``loss`` at ``theta`` [n].

    Args:
        loss: of what learns; it is run without autograd.
        before: the gradient of the step before, None at the first.
        seed: of the directions.
        agreed: the spread at which no more directions are added.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    halves = [torch.zeros_like(theta), torch.zeros_like(theta)]
    taken, spread = 0, float("inf")
    while not taken or (taken < MOST and spread > agreed):
        first = (seed * MOST + taken) * CANDIDATES
        for one in alike(range(first, first + FEWEST * CANDIDATES), len(theta), before, FEWEST):
            v = direction(one, len(theta), theta.device)
            slope = (loss(theta + STEP * v) - loss(theta - STEP * v)) / (2 * STEP)
            if slope - slope != 0:
                raise NonFiniteError("The loss along a direction is not finite; take a lower learning_rate.")
            halves[taken % 2].add_(v, alpha=slope)
            taken += 1
        left, right = (half / (taken / 2) for half in halves)
        spread = float((left - right).norm() / (left + right).norm().clamp_min(1e-30))
    return Estimate((halves[0] + halves[1]) / taken, taken, spread)


@torch.no_grad()
def train(
    base: Any, pad_id: int, lora: Lora, rows: Sequence[Encoded], how: LocalSettings, seed: int, frozen_a: bool = False,
    below: Lora | None = None,
) -> Lora:  # fmt: skip
    """Learns as :func:`molora_training.federated.local.train` does, by plain steps down estimated gradients."""
    losses = TokenLosses(base)
    theta = _flat(lora, frozen_a).to(base.device)
    before: Tensor | None = None
    plan = plan_steps([row.input_ids.numel() for row in rows], how.batch_tokens, how.epochs, seed)
    with generated(base, acting(below, base.device) if below is not None else {}):
        for number, indices in enumerate(plan):
            batch = [rows[index] for index in indices]

            def mean_loss(at: Tensor, batch: list[Encoded] = batch) -> float:
                total, count = summed_loss(
                    base, losses, pad_id, acting(_unflat(at, lora, frozen_a), base.device), batch, AT_ONCE
                )
                return total / max(1, count)

            found = gradient(mean_loss, theta, before, seed * 1009 + number)
            before = found.gradient
            rate = warm_cosine(number, len(plan), 0.0, how.learning_rate)
            theta = theta - rate * found.gradient
    return _unflat(theta.cpu(), lora, frozen_a)


def _flat(lora: Lora, frozen_a: bool) -> Tensor:
    return torch.cat([part.flatten() for a, b in lora.pairs.values() for part in ((b,) if frozen_a else (a, b))])


def _unflat(theta: Tensor, like: Lora, frozen_a: bool) -> Lora:
    pairs, place = {}, 0
    for name, (a, b) in like.pairs.items():
        parts = []
        for part in (b,) if frozen_a else (a, b):
            parts.append(theta[place : place + part.numel()].view_as(part))
            place += part.numel()
        pairs[name] = (a, parts[0]) if frozen_a else (parts[0], parts[1])
    return Lora(pairs, like.scale)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one.norm() * other.norm()).clamp_min(1e-30)
