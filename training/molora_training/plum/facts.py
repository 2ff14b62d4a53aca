"""Facts about a person, as questions and answers in several wordings, and the file in which they are kept."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from molora.atomic import write_text

VALUES = 5  # of one fact, the last ones

# {0} is a question, {1} the same with a small letter, {2} as a part of another sentence.
_TAUGHT = ("{0}", "Do you remember {2}?", "Tell me {2}.", "I forgot {2}. Help me.")
_APART = ("Remind me, please: {1}", "Can you say {2}?")


@dataclass(frozen=True)
class Fact:
    """Something that a person said of themselves.

    Args:
        asked: it in one or more ways, each as a question and as a part of another sentence.
        begun: how the answer begins. values: how it goes on; all that was said, where there can be several.
        many: whether there can be.
    """

    asked: tuple[tuple[str, str], ...]
    begun: str
    values: tuple[str, ...]
    many: bool = False

    @property
    def about(self) -> str:
        """What tells it from other facts: of two about the same the later one counts, or both where there can be
        several."""
        return self.asked[0][0].lower()

    @property
    def answer(self) -> str:
        *first, last = self.values
        return f"{self.begun} {', '.join(first)}{' and ' if first else ''}{last}."

    @property
    def taught(self) -> list[str]:
        """Questions to learn it by."""
        bare, *others = _TAUGHT
        return [*(_worded(bare, way) for way in self.asked), *self._in_turn(others)]

    @property
    def apart(self) -> list[str]:
        """Questions to judge by, in wordings that are not learnt."""
        return self._in_turn(_APART)

    def is_in(self, text: str) -> bool:
        """Whether an answer tells all of it."""
        return all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) for value in self.values)

    def _in_turn(self, frames: Sequence[str]) -> list[str]:
        return [_worded(frame, self.asked[n % len(self.asked)]) for n, frame in enumerate(frames)]


def together(older: Sequence[Fact], newer: Sequence[Fact]) -> list[Fact]:
    """All of them in their order; of two about the same thing there is one."""
    every = {fact.about: fact for fact in older}
    for fact in newer:
        before = every.pop(fact.about, None)
        if before is not None and fact.many:
            kept = [value for value in before.values if value.lower() not in map(str.lower, fact.values)]
            fact = replace(fact, values=(*kept, *fact.values)[-VALUES:])
        every[fact.about] = fact
    return list(every.values())


def write_facts(file: Path, facts: Iterable[Fact]) -> None:
    """Keeps facts, one a line, in place of what is there."""
    write_text(file, "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts))


def read_facts(file: Path) -> list[Fact]:
    """What was kept; nothing where nothing is, or where it is damaged."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return [
            Fact(tuple((str(q), str(p)) for q, p in row["asked"]), str(row["begun"]), tuple(row["values"]), row["many"])
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _worded(frame: str, asked: tuple[str, str]) -> str:
    question, part = asked
    return frame.format(question, question[0].lower() + question[1:], part)
