"""Held-out items that share a long run of words with the training items, which would flatter the figures."""

import re
from collections.abc import Iterable, Sequence

from .items import Item

GRAM = 13
_WORD = re.compile(r"\w+")


def grams(text: str) -> set[int]:
    """The hashes of every run of 13 words of a text, case and punctuation aside."""
    words = _WORD.findall(text.lower())
    return {hash(tuple(words[start : start + GRAM])) for start in range(len(words) - GRAM + 1)}


def without_overlap(held_out: Sequence[Item], train: Iterable[Item]) -> list[Item]:
    """The held-out items that share no run of 13 words, question or answer, with any training item."""
    seen: set[int] = set()
    for item in train:
        seen |= grams(item.content)
    return [item for item in held_out if not grams(item.content) & seen]
