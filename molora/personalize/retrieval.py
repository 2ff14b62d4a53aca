"""Which of a user's interactions a question is nearest to: by shared words (BM25), by meaning, or by both.

Both orders are fused by reciprocal rank (Cormack et al. 2009): score(d) = sum over orders of 1 / (60 + rank of d).
"""

import re
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from molora.errors import ConfigError
from molora.personalize.bm25 import bm25s
from molora.personalize.history import Interaction

Way = Literal["words", "meaning", "both"]

_WORD = re.compile(r"\w+")
_FUSION_OFFSET = 60
# Sums of the same numbers in batches of other shapes differ in the last digits; a tie must not be decided by them.
_DECIMALS = 5


class Encoder(Protocol):
    """What turns texts into vectors, such as `molora.personalize.embeddings.SentenceEncoder`."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, D], float32, on the CPU."""
        ...


class Retriever:
    """An index over one user's interactions or texts. Of equally near ones the earlier comes first, always.

    Args:
        items: what is searched; of an interaction both the question and the answer.
        encoder: for the order by meaning; without it there is the order by words only.
        embeddings: [N, D], the items' unit vectors where they are known already; else `encoder` makes them.
    """

    def __init__(
        self,
        items: Sequence[Interaction | str],
        encoder: Encoder | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> None:
        self._items = list(items)
        self._encoder = encoder
        if embeddings is None and encoder is not None:
            embeddings = encoder.encode([text_of(item) for item in self._items])
        if embeddings is not None and len(embeddings) != len(self._items):
            raise ConfigError(f"There are {len(self._items)} items and {len(embeddings)} embeddings: give one each.")
        self._embeddings = embeddings
        documents = [words(text_of(item)) for item in self._items]
        self._bm25 = _index(documents)
        self._known = {word for document in documents for word in document}

    def __len__(self) -> int:
        return len(self._items)

    def top(self, query: str, k: int, way: Way | None = None) -> list[Interaction | str]:
        """The `k` items that are nearest to `query`, nearest first.

        By words alone it can be fewer: what shares no word with the query is not among them.

        Args:
            way: None means "both" with an encoder and "words" without.

        Raises:
            ConfigError: `k` is negative, `way` is unknown, or it needs an encoder and there is none.
        """
        return [self._items[place] for place in self.places(query, k, way)]

    def places(self, query: str, k: int, way: Way | None = None) -> list[int]:
        """As `top`, the items' indices."""
        way = way or ("words" if self._encoder is None else "both")
        if k < 0:
            raise ConfigError(f"k is {k}: ask for 0 items or more.")
        if way not in ("words", "meaning", "both"):
            raise ConfigError(f"There is no way '{way}' to search: choose from words, meaning and both.")
        if way != "words" and self._encoder is None:
            raise ConfigError("To search by meaning, give the retriever an encoder.")
        orders = [self._by_words(query)] if way != "meaning" else []
        if way != "words":
            orders.append(self._by_meaning(query))
        return (orders[0] if len(orders) == 1 else fuse(orders))[:k]

    def _by_words(self, query: str) -> list[int]:
        known = [word for word in words(query) if word in self._known]
        if self._bm25 is None or not known:
            return []
        scores = np.round(self._bm25.get_scores(known), _DECIMALS)
        return [place for place in np.argsort(-scores, kind="stable").tolist() if scores[place] > 0]

    def _by_meaning(self, query: str) -> list[int]:
        assert self._encoder is not None and self._embeddings is not None  # by the test in `places`
        if not self._items:
            return []
        scores = (self._embeddings @ self._encoder.encode([query])[0]).numpy().round(_DECIMALS)  # [N]
        return np.argsort(-scores, kind="stable").tolist()


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, digits and underscores, of one letter too."""
    return _WORD.findall(text.lower())


def text_of(item: Interaction | str) -> str:
    """What is searched of an item."""
    return item if isinstance(item, str) else f"{item.question}\n{item.answer}"


def fuse(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of several, by the sum of reciprocal ranks; an index that an order lacks gets nothing from it."""
    scores: dict[int, float] = {}
    for order in orders:
        for rank, place in enumerate(order, 1):
            scores[place] = scores.get(place, 0.0) + 1 / (_FUSION_OFFSET + rank)
    return sorted(scores, key=lambda place: (-round(scores[place], 12), place))


def _index(documents: Sequence[Sequence[str]]):  # type: ignore[no-untyped-def]  # bm25s has no annotations
    if not any(documents):
        return None
    index = bm25s().BM25()
    index.index([list(document) for document in documents], show_progress=False)
    return index
