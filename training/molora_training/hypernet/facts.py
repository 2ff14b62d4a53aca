"""Texts with facts in them, made up by configs/facts.yaml, and questions for the facts.

A number that always stands in the same sentence teaches a document network that sentence. Here are many relations, each
in several wordings, and a text tells several facts, so that what is asked for has to be told from what is not. What a
network has learnt of it is judged by wordings, and by whole relations, that it never learns from.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from molora_training.data.lessons import Lesson
from molora_training.hypernet.filler import WORDS, sentences
from molora_training.settings import from_mapping

CONFIG = Path(__file__).parent.parent / "configs" / "facts.yaml"
MOST = 3  # facts of a text
_FIRST = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Klara", "Leo", "Mara",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Victor", "Wanda", "Yusuf", "Zoe", "Amir", "Bella", "Carlos",
)  # fmt: skip
_LAST = (
    "Abbott", "Brandt", "Castle", "Dorn", "Ellis", "Fischer", "Graves", "Holm", "Iverson", "Jansen", "Keller", "Lund",
    "Marsh", "Novak", "Osborne", "Perez", "Quinn", "Rossi", "Stone", "Tanaka", "Underhill", "Vega", "Weber", "Young",
)  # fmt: skip

Judged = Literal["wordings", "relations"]
"""By what: wordings of known relations, or relations, that nothing is learnt from."""
JUDGED: dict[str, Judged] = {"facts in other wordings": "wordings", "facts of other kinds": "relations"}


@dataclass(frozen=True)
class Relation:
    """of: a key of names. value: a key of values. says, asks: wordings, of which the last one judges. apart: all do."""

    of: str
    value: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    apart: bool = False


@dataclass(frozen=True)
class Facts:
    """Of a file as configs/facts.yaml."""

    names: dict[str, tuple[str, ...]]
    values: dict[str, tuple[str, ...]]
    relations: dict[str, Relation]

    def lesson(self, chance: random.Random, tokens: int, judged: Judged | None = None) -> Lesson:
        """A text of about so many tokens with one to MOST facts of different names, and a question for each.

        judged: draws what is never learnt from.
        """
        pool = [one for one in self.relations.values() if one.apart == (judged == "relations")]
        told: list[tuple[str, str, str]] = []  # name, question, answer
        lines: list[str] = []
        relation = chance.choice(pool)
        for _ in range(chance.randint(1, MOST)):
            # Often of the relation before, so that the name has to tell them apart.
            relation = relation if chance.random() < 0.5 else chance.choice(pool)
            name = _new(chance, self.names[relation.of], [one[0] for one in told])
            value = _new(chance, self.values[relation.value], [one[2] for one in told])
            says, asks = (_wording(chance, some, judged) for some in (relation.says, relation.asks))
            lines.append(_sentence(says.format(name=name, value=value)))
            told.append((name, _sentence(asks.format(name=name)), value))
        text = sentences(chance, tokens, len(lines))
        for line in lines:
            text.insert(chance.randint(0, len(text)), line)
        return Lesson(" ".join(text), tuple((question, answer) for _, question, answer in told))


@cache
def facts() -> Facts:
    """Those of configs/facts.yaml."""
    read = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    names, values = ({name: tuple(some) for name, some in read[part].items()} for part in ("names", "values"))
    relations = {name: from_mapping(Relation, one, f"relations.{name}.") for name, one in read["relations"].items()}
    return Facts(names, values, relations)


def _wording(chance: random.Random, some: tuple[str, ...], judged: Judged | None) -> str:
    return some[-1] if judged or len(some) == 1 else chance.choice(some[:-1])


def _new(chance: random.Random, patterns: tuple[str, ...], taken: list[str]) -> str:
    """One that is not taken yet."""
    while True:
        made = re.sub(r"\{[wW]ord\}", lambda part: _word(chance, part.group()), chance.choice(patterns))
        made = made.replace("{First}", chance.choice(_FIRST)).replace("{Last}", chance.choice(_LAST))
        made = re.sub("#+", lambda part: _number(chance, len(part.group())), made)
        if made not in taken:
            return made


def _word(chance: random.Random, part: str) -> str:
    word = chance.choice(WORDS)
    return word.capitalize() if part == "{Word}" else word


def _number(chance: random.Random, digits: int) -> str:
    return str(chance.randrange(10 ** (digits - 1), 10**digits))


def _sentence(text: str) -> str:
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]
