"""Conversations that change their domain from one question to the next: what routing is trained and judged on."""

import random
from collections.abc import Mapping, Sequence

from molora.errors import DataError

from .items import Example, MixedExample, Split
from .text import approx_tokens

MAX_TOKENS = 1024
# ChatML's marks and roles around one question and its answer.
_TOKENS_AROUND_PAIR = 12


def mix(examples: Mapping[str, Sequence[Example]], split: Split, count: int, seed: int = 0) -> list[MixedExample]:
    """Builds `count` conversations of 2 to 4 pairs, consecutive pairs of different domains, of one split.

    Args:
        examples: the examples by domain; those of other splits are an error.
        split: the split all of them belong to.
        count: how many conversations.
        seed: the same seed and examples give the same conversations.

    Raises:
        DataError: fewer than two domains have examples, or an example is of another split.
    """
    pools = {domain: list(rows) for domain, rows in examples.items() if rows}
    if len(pools) < 2:
        raise DataError("Mixed conversations need examples of at least two domains.")
    strangers = [row.id for rows in pools.values() for row in rows if row.split != split]
    if strangers:
        raise DataError(f"Example {strangers[0]} is not of the split '{split}'.")
    draw = random.Random(f"mixed:{split}:{seed}")
    decks: dict[str, list[Example]] = {domain: [] for domain in pools}
    return [_one(pools, decks, split, number, draw) for number in range(count)]


def _one(
    pools: Mapping[str, list[Example]],
    decks: dict[str, list[Example]],
    split: Split,
    number: int,
    draw: random.Random,
) -> MixedExample:
    target = draw.randint(2, 4)
    chosen: list[Example] = []
    room = MAX_TOKENS
    while len(chosen) < target:
        others = sorted(domain for domain in pools if not chosen or domain != chosen[-1].domain)
        domain = draw.choice(others)
        if not decks[domain]:  # every example comes once before any comes again
            decks[domain] = draw.sample(pools[domain], len(pools[domain]))
        example = decks[domain].pop()
        size = _size(example)
        if size > room and len(chosen) >= 2:
            break
        chosen.append(example)
        room -= size
    return MixedExample(
        id=f"mixed-{split}-{number}",
        split=split,
        messages=tuple(message for example in chosen for message in example.messages),
        domains=tuple(domain for example in chosen for domain in example.domains),
    )


def _size(example: Example) -> int:
    return _TOKENS_AROUND_PAIR + sum(approx_tokens(message["content"]) for message in example.messages)
