"""Writes training/molora_training/plum/topics.txt: what other conversations and texts are about, of which
`molora learn` makes questions about what was not discussed. The data has to be there:

molora train data passages commonsense medicine law science
molora train personas general --tries 1

python -m tools.draw_topics
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from molora_training.data import data_dir
from molora_training.data.lessons import read_lessons
from molora_training.plum import bank
from molora_training.plum.conversations import about_texts
from molora_training.plum.topics import stems, topics

COUNTS = {"passages": 1000, "general": 200, "commonsense": 100, "medicine": 100, "law": 100, "science": 100}


def main(out: Path = bank.DRAWN) -> None:
    chance = Random(0)
    everyday = {frozenset(stems(one.name)) for one in bank.BANK if one.everyday}
    found: dict[frozenset[str], str] = {}
    for name, count in COUNTS.items():
        some = [topic for one in conversations(name) for topic in topics(one) if topic.replace(" ", "").isalpha()]
        chance.shuffle(some)
        new = {frozenset(stems(topic)): topic for topic in some}
        found |= {
            key: new[key] for key in [key for key in new if key and key not in found and key not in everyday][:count]
        }
    out.write_text("\n".join(sorted(found.values(), key=str.lower)) + "\n", encoding="utf-8")


def conversations(name: str) -> Iterator[Any]:
    """The turns of each, in the data's order."""
    file = data_dir() / f"{name}.train.jsonl"
    if name == "passages":
        yield from (one.messages for one in about_texts(read_lessons(file)))
    else:
        yield from (json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
