"""Conversations and texts that change their domain: what routing is trained and judged on.

By turns: a question of another domain each time. In a turn: two questions at once, and both answers. As a document:
problems with their answers, one after the other, in one text. With an aside: a question beside a sentence of another
domain, which asks for nothing.
"""

import random
from collections.abc import Iterable, Mapping, Sequence

from molora.errors import DataError

from .items import Example, MixedExample, Part, Split
from .text import approx_tokens, sentences

MAX_TOKENS = 1024
# ChatML's marks and roles around one question and its answer.
_TOKENS_AROUND_PAIR = 12
# What stands between two questions of one turn, and what asks for a document: of training, and of the test split alone.
JOINTS = (
    ("\n\n", "\n\n", "\n\nAlso: ", "\n\nAnd another one: ", " Second question: ", "\n---\n", "\n\n2. ", "\n\nThen: "),
    ("\n\nWhile you are at it: ", "\n\nPS: ", " || "),
)
ASIDE_WORDS = 16
# Between an aside and what follows it.
PAUSES = (" ", "\n", "\n\n", ": ", " - ")
REQUESTS = (
    ("Write out the worksheet.", "Continue the notes.", "My revision notes:", "Show me the collection.", "Page 1"),
    ("Type up the notebook for me.", "From the archive:"),
)


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
    deck = _Deck(examples, split, random.Random(f"mixed:{split}:{seed}"))
    return [_one(deck, split, number) for number in range(count)]


def mix_in_a_turn(
    examples: Mapping[str, Sequence[Example]], split: Split, count: int, seed: int = 0
) -> list[MixedExample]:
    """`count` conversations of one turn that asks two questions of different domains, answered in their order.

    Arguments and errors as of :func:`mix`.
    """
    deck = _Deck(examples, split, random.Random(f"in a turn:{split}:{seed}"))
    found = []
    for number in range(count):
        first = deck.draw(())
        second = deck.draw((first.domain,), MAX_TOKENS - _size(first))
        joint = deck.random.choice(JOINTS[split == "test"])
        questions = (Part(_question(first) + joint, 0, False), Part(_question(second), 1, False))
        answers = (Part(_answer(first) + "\n\n", 0, True), Part(_answer(second), 1, True))
        found.append(_of_parts(f"turn-{split}-{number}", split, (first, second), (questions, answers)))
    return found


def mix_documents(
    examples: Mapping[str, Sequence[Example]], split: Split, count: int, seed: int = 0
) -> list[MixedExample]:
    """`count` texts of 2 to 4 problems with their answers, consecutive ones of different domains, in one turn of the
    assistant; only answers are to be written.

    Arguments and errors as of :func:`mix`.
    """
    deck = _Deck(examples, split, random.Random(f"document:{split}:{seed}"))
    found = []
    for number in range(count):
        chosen = _several(deck)
        parts: list[Part] = []
        for pair, example in enumerate(chosen):
            parts.append(Part(("\n\n" if pair else "") + _question(example) + "\n", pair, False))
            parts.append(Part(_answer(example), pair, True))
        asked = (Part(deck.random.choice(REQUESTS[split == "test"]), 0, False),)
        found.append(_of_parts(f"document-{split}-{number}", split, chosen, (asked, tuple(parts))))
    return found


def mix_asides(
    examples: Mapping[str, Sequence[Example]], split: Split, count: int, seed: int = 0
) -> list[MixedExample]:
    """`count` questions with their answers; before each question, or after every third, a sentence of another domain's
    question: so that how a question is introduced does not decide who answers it.

    Arguments and errors as of :func:`mix`.
    """
    deck = _Deck(examples, split, random.Random(f"aside:{split}:{seed}"))
    found = []
    for number in range(count):
        other = deck.draw(())
        example = deck.draw((other.domain,))
        words = deck.random.choice(sentences(_question(other))).split()[:ASIDE_WORDS]
        pause = deck.random.choice(PAUSES)
        if number % 3 == 2:
            chosen = (example, other)
            asked = (Part(_question(example) + pause, 0, False), Part(" ".join(words), 1, False))
        else:
            chosen = (other, example)
            asked = (Part(" ".join(words) + pause, 0, False), Part(_question(example), 1, False))
        answers = (Part(_answer(example), chosen.index(example), True),)
        found.append(_of_parts(f"aside-{split}-{number}", split, chosen, (asked, answers)))
    return found


def mix_all_ways(
    examples: Mapping[str, Sequence[Example]], split: Split, counts: Iterable[int], seed: int = 0
) -> list[MixedExample]:
    """Of :func:`mix`, :func:`mix_documents`, :func:`mix_in_a_turn` and :func:`mix_asides`, in this order, so many as
    ``counts`` says; errors as of them."""
    ways = zip((mix, mix_documents, mix_in_a_turn, mix_asides), counts, strict=True)
    return [one for way, count in ways if count for one in way(examples, split, count, seed)]


class _Deck:
    """Examples by domain, each once before any comes again.

    Raises:
        DataError: fewer than two domains have examples, or an example is of another split.
    """

    def __init__(self, examples: Mapping[str, Sequence[Example]], split: Split, draw: random.Random) -> None:
        self.pools = {domain: list(rows) for domain, rows in examples.items() if rows}
        if len(self.pools) < 2:
            raise DataError("Mixed conversations need examples of at least two domains.")
        strangers = [row.id for rows in self.pools.values() for row in rows if row.split != split]
        if strangers:
            raise DataError(f"Example {strangers[0]} is not of the split '{split}'.")
        self.random = draw
        self._left: dict[str, list[Example]] = {domain: [] for domain in self.pools}

    def draw(self, other_than: Sequence[str], room: int | None = None) -> Example:
        """One of a domain that is none of `other_than`; at most eight times another one while it takes over `room`
        tokens."""
        for _ in range(8):
            domain = self.random.choice(sorted(name for name in self.pools if name not in other_than))
            if not self._left[domain]:
                self._left[domain] = self.random.sample(self.pools[domain], len(self.pools[domain]))
            example = self._left[domain].pop()
            if room is None or _size(example) <= room:
                break
        return example


def _several(deck: _Deck) -> list[Example]:
    """2 to 4 examples, consecutive ones of different domains, that fit into one conversation."""
    target = deck.random.randint(2, 4)
    chosen: list[Example] = []
    room = MAX_TOKENS
    while len(chosen) < target:
        example = deck.draw([chosen[-1].domain] if chosen else ())
        size = _size(example)
        if size > room and len(chosen) >= 2:
            break
        chosen.append(example)
        room -= size
    return chosen


def _of_parts(
    name: str, split: Split, chosen: Sequence[Example], turns: tuple[tuple[Part, ...], tuple[Part, ...]]
) -> MixedExample:
    roles = ("user", "assistant")
    messages = tuple(
        {"role": role, "content": "".join(part.text for part in turn)} for role, turn in zip(roles, turns, strict=True)
    )
    return MixedExample(name, split, messages, tuple(example.domain for example in chosen), turns)


def _question(example: Example) -> str:
    return example.messages[0]["content"]


def _answer(example: Example) -> str:
    return example.messages[1]["content"]


def _one(deck: _Deck, split: Split, number: int) -> MixedExample:
    chosen = _several(deck)
    return MixedExample(
        id=f"mixed-{split}-{number}",
        split=split,
        messages=tuple(message for example in chosen for message in example.messages),
        domains=tuple(domain for example in chosen for domain in example.domains),
    )


def _size(example: Example) -> int:
    return _TOKENS_AROUND_PAIR + sum(approx_tokens(message["content"]) for message in example.messages)
