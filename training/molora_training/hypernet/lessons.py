"""What a document network learns from: texts, and questions about them that the texts answer."""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from molora.errors import DataError
from molora_training.data.gaps import gaps
from molora_training.data.lessons import KINDS, Lesson, of_kind, read_lessons
from molora_training.hypernet.facts import JUDGED, facts
from molora_training.hypernet.filler import WORDS, sentences

BARE = "texts"
# Turns of the kinds. What is answered by yes or no is most of what there is, and half of it is right without any text.
MIX = ("words", BARE, "words", "yes or no", "words", BARE, "words", BARE)


class Lessons(Protocol):
    """Where lessons come from."""

    def of_step(self, step: int, count: int) -> list[Lesson]:
        """Those of a training step: by its number alone."""

    def held_out(self) -> dict[str, list[Lesson]]:
        """For validation, by kind: of texts that no step has."""


@dataclass(frozen=True)
class Needles:
    """A number hidden in filler, and the question for it: the smallest task that shows whether a text was read.

    tokens: the shortest and the longest text, about. digits: of the number. count: of the held-out lessons. grow:
    steps over which the longest grows to its length from the shortest: where every text is long from the first step
    on, nothing tells the network that the number is what matters. facts: share of texts that tell other facts instead,
    in many wordings.
    """

    tokens: tuple[int, int] = (32, 256)
    digits: int = 4
    seed: int = 0
    count: int = 128
    grow: int = 0
    facts: float = 0.0

    def of_step(self, step: int, count: int) -> list[Lesson]:
        chance = random.Random(f"needle/{self.seed}/{step}")
        first, last = self.tokens
        longest = first + round((last - first) * min(1.0, (step + 1) / (self.grow or 1)))
        return [self._one(chance, chance.randint(first, longest)) for _ in range(count)]

    def held_out(self) -> dict[str, list[Lesson]]:
        found = {"needles": self.of_length(self.tokens[1])}
        for kind, judged in JUDGED.items() if self.facts else ():
            chance = random.Random(f"facts/{self.seed}/{kind}")
            found[kind] = [facts().lesson(chance, self.tokens[1], judged) for _ in range(self.count)]
        return found

    def of_length(self, tokens: int) -> list[Lesson]:
        """Held-out lessons of one length; their numbers and fillers are drawn apart from every step's."""
        chance = random.Random(f"needle/{self.seed}/held out/{tokens}")
        return [needle(chance, tokens, self.digits) for _ in range(self.count)]

    def _one(self, chance: random.Random, tokens: int) -> Lesson:
        if self.facts and chance.random() < self.facts:
            return facts().lesson(chance, tokens)
        return needle(chance, tokens, self.digits)


def needle(chance: random.Random, tokens: int, digits: int) -> Lesson:
    """One text of about so many tokens, with its needle anywhere in it."""
    name = f"{chance.choice(WORDS)} {chance.choice(WORDS)}"
    number = "".join(chance.choice("0123456789") for _ in range(digits))
    lines = sentences(chance, tokens, 1)
    lines.insert(chance.randint(0, len(lines)), f"The magic number for {name} is {number}.")
    return Lesson(" ".join(lines), ((f"What is the magic number for {name}?", f"The magic number is {number}."),))


class Passages:
    """Passages with questions, and texts without, from files: ``<name>.train.jsonl`` and ``<name>.validation.jsonl``, a
    lesson a line. A passage with questions of both kinds is two lessons.

    Args:
        folder: of the files. name: of the set.
        questions: at most so many of a passage are asked in a step. gaps: and so many of :func:`gaps`; of a text that
            has no question as many as of both. Without gaps such texts are left out.

    Raises:
        DataError: there is nothing to ask, or nothing held out that is answered in words.
    """

    def __init__(self, folder: Path, name: str, questions: int = 4, seed: int = 0, gaps: int = 0) -> None:
        self.questions, self.seed, self.gaps = questions, seed, gaps
        lessons = read_lessons(folder / f"{name}.train.jsonl")
        pools: dict[str, list[Lesson]] = {kind: of_kind(lessons, kind) for kind in KINDS}
        pools[BARE] = [lesson for lesson in lessons if gaps and not lesson.questions]
        self.pools = {kind: pool for kind, pool in pools.items() if pool}
        self.mix = [kind for kind in MIX if kind in self.pools]
        self.validation = of_kind(read_lessons(folder / f"{name}.validation.jsonl"), "words")
        if not self.pools or not self.validation:
            raise DataError(f"{folder / name}.*.jsonl: nothing is asked, or nothing that is held out in words.")

    def of_step(self, step: int, count: int) -> list[Lesson]:
        return [self._at(place) for place in range(step * count, (step + 1) * count)]

    def _at(self, place: int) -> Lesson:
        round_, turn = divmod(place, len(self.mix))
        kind = self.mix[turn]
        before = round_ * self.mix.count(kind) + self.mix[:turn].count(kind)
        epoch, index = divmod(before, len(self.pools[kind]))
        lesson = self.pools[kind][_order(f"passages/{self.seed}/{kind}/{epoch}", len(self.pools[kind]))[index]]
        chance = random.Random(f"passages/{self.seed}/{place}")
        asked = chance.sample(lesson.questions, min(self.questions, len(lesson.questions)))
        more = self.gaps + (self.questions if kind == BARE else 0)
        return Lesson(lesson.text, (*asked, *gaps(lesson.text, chance, more)))

    def held_out(self) -> dict[str, list[Lesson]]:
        return {"words": self.validation}


@dataclass(frozen=True)
class Mixed:
    """Passages, and in each step ``count`` needles beside them, so that those are not forgotten."""

    passages: Passages
    needles: Needles
    count: int

    def of_step(self, step: int, count: int) -> list[Lesson]:
        # Needles stand together: each is held to say nothing about its neighbour, which is hardest among their like.
        return [*self.needles.of_step(step, self.count), *self.passages.of_step(step, count - self.count)]

    def held_out(self) -> dict[str, list[Lesson]]:
        return {**self.passages.held_out(), **self.needles.held_out()}


@lru_cache(maxsize=8)
def _order(key: str, size: int) -> list[int]:
    order = list(range(size))
    random.Random(key).shuffle(order)
    return order
