"""Texts with questions that they answer: what a network learns from that makes adapters of documents."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molora.errors import DataError

from .items import SPLITS, Item, Split
from .overlap import grams, without_overlap
from .text import stable_fraction

Kind = Literal["words", "yes or no"]
KINDS: tuple[Kind, ...] = ("words", "yes or no")


@dataclass(frozen=True)
class Lesson:
    """A text and (question, answer) pairs about it, which may be none."""

    text: str
    questions: tuple[tuple[str, str], ...]


def of_kind(lessons: Iterable[Lesson], kind: Kind) -> list[Lesson]:
    """The lessons with their questions of one kind alone; those that have none are left out.

    Where most of what is asked is answered by yes or no, half of it is right without any text.
    """
    found = []
    for lesson in lessons:
        pairs = tuple(pair for pair in lesson.questions if _kind(pair[1]) == kind)
        if pairs:
            found.append(Lesson(lesson.text, pairs))
    return found


def _kind(answer: str) -> Kind:
    return "yes or no" if answer.strip(" .").lower() in ("yes", "no") else "words"


def lessons_of(
    items: Iterable[Item], more: Iterable[Item] = (), texts: Iterable[str] = ()
) -> tuple[dict[Split, list[Lesson]], dict[Split, int]]:
    """A lesson for each passage, by split, in an order that does not depend on the source; and how many held-out
    questions were left out since they share their words with training text.

    Args:
        items: of all splits. more, texts: learnt from alone, as far as they share no run of words with what is held
            out; of texts nothing is asked.
    """
    by_split: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        by_split[item.split].append(item)
    overlapping: dict[Split, int] = {}
    for split in SPLITS[1:]:
        clean = without_overlap(by_split[split], by_split["train"])
        overlapping[split] = len(by_split[split]) - len(clean)
        by_split[split] = clean
    held_out = {gram for split in SPLITS[1:] for item in by_split[split] for gram in grams(item.content)}
    by_split["train"] += [item for item in more if not grams(item.content) & held_out]
    found = {split: _by_passage(rows) for split, rows in by_split.items()}
    found["train"] += [Lesson(text, ()) for text in texts if not grams(text) & held_out]
    found["train"].sort(key=lambda lesson: stable_fraction(f"order:{lesson.text}"))
    return found, overlapping


def _by_passage(items: Iterable[Item]) -> list[Lesson]:
    by_passage: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        by_passage.setdefault(item.body["passage"], []).append((item.body["question"], item.answers["plain"]))
    lessons = [Lesson(text, tuple(dict.fromkeys(pairs))) for text, pairs in by_passage.items()]
    return sorted(lessons, key=lambda lesson: stable_fraction(f"order:{lesson.text}"))


def read_lessons(path: Path) -> list[Lesson]:
    """Reads {"text": ..., "questions": [{"question": ..., "answer": ...}, ...]} a line.

    Raises:
        DataError: there is no such file, or a line is no lesson.
    """
    if not path.is_file():
        raise DataError(f"There is no {path}: make it with `molora train data passages`.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pairs = tuple((str(one["question"]), str(one["answer"])) for one in row["questions"])
            lesson = Lesson(str(row["text"]), pairs)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no text with questions and answers ({error}).") from error
        if not lesson.text.strip():
            raise DataError(f"{path}, line {number}: the text is empty.")
        found.append(lesson)
    if not found:
        raise DataError(f"{path} holds no lesson.")
    return found


def write_lessons(path: Path, lessons: Sequence[Lesson]) -> None:
    """Writes what :func:`read_lessons` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    with draft.open("w", encoding="utf-8") as out:
        for lesson in lessons:
            pairs = [{"question": question, "answer": answer} for question, answer in lesson.questions]
            out.write(json.dumps({"text": lesson.text, "questions": pairs}, ensure_ascii=False) + "\n")
    draft.replace(path)
