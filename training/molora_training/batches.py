"""Which examples go together: batches of similar length under a token budget, the same for the same seed."""

import random
from collections.abc import Sequence

_SHORTEST = 32  # tokens
# Lengths are sorted within this many batches' worth of examples: little padding, yet mixed epochs.
_WINDOW_BATCHES = 32


def rounded(length: int) -> int:
    """Tokens to which a batch is filled up: a power of two or one and a half of it, so that few shapes come."""
    size = max(_SHORTEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 and size > _SHORTEST else size


def plan_steps(lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int) -> list[list[int]]:
    """Plan a whole training: for each step the indices of its batch, which processes may share.

    A batch's padded size (examples times the longest, rounded up by :func:`rounded`) is at most `batch_tokens`, but an
    example longer than that is a batch alone. Each epoch holds every example.
    """
    lengths = [rounded(length) for length in lengths]
    steps: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = _bucket(order, lengths, batch_tokens)
        rng.shuffle(batches)
        steps += batches
    return steps


def plan_pass(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches for one pass over all examples, longest last; sizes as in `plan_steps`."""
    return _fill(sorted(range(len(lengths)), key=lambda index: (lengths[index], index)), lengths, batch_tokens)


def _bucket(order: list[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    mean_length = max(1, sum(lengths) // max(1, len(lengths)))
    window = max(1, _WINDOW_BATCHES * batch_tokens // mean_length)
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += _fill(near, lengths, batch_tokens)
    return batches


def _fill(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut `order`, which is sorted by length, into batches."""
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
