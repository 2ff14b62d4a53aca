"""Which requests come and when: many users at random times, the same for the same seed. Without torch."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Traffic:
    """What comes, in the terms of S-LoRA's evaluation (arXiv 2311.03285).

    requests: how many. rate: a second, on average; inf: all at once. cv: coefficient of variation of the time between
    two; 1: Poisson. users: how many there are. zipf: user k asks in proportion to 1 / k^zipf; 0: all alike. prompt,
    answer: fewest and most tokens, equally likely.
    """

    requests: int = 200
    rate: float = 2.0
    cv: float = 1.0
    users: int = 100
    zipf: float = 1.0
    prompt: tuple[int, int] = (8, 128)
    answer: tuple[int, int] = (8, 64)
    seed: int = 0


@dataclass(frozen=True)
class Arrival:
    """A request to come: ``at`` seconds from the beginning."""

    at: float
    user: int
    prompt: int
    answer: int


def arrivals(traffic: Traffic) -> list[Arrival]:
    """The requests in the order in which they come; the same for the same seed."""
    chance = np.random.default_rng(traffic.seed)
    count = traffic.requests
    gaps = np.zeros(count)
    if math.isfinite(traffic.rate):
        shape = 1 / traffic.cv**2
        gaps = chance.gamma(shape, 1 / (traffic.rate * shape), count)
    shares = 1 / np.arange(1, traffic.users + 1) ** traffic.zipf
    users = chance.choice(traffic.users, count, p=shares / shares.sum())
    prompts = chance.integers(traffic.prompt[0], traffic.prompt[1] + 1, count)
    answers = chance.integers(traffic.answer[0], traffic.answer[1] + 1, count)
    times = np.cumsum(gaps)
    return [
        Arrival(float(at), int(user), int(prompt), int(answer))
        for at, user, prompt, answer in zip(times, users, prompts, answers, strict=True)
    ]
