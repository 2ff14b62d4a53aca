"""The records of the data part and where they live on disk: raw items, finished examples, the split of an id."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from molora.errors import DataError

from .text import stable_fraction

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DOMAINS = ("math", "code", "medicine", "law", "ukrainian")
OTHERS = ("science", "reading", "commonsense", "puzzles")  # that the starter stack has no adapter for
# Train and validation. Of public benchmarks so much is held out that a figure means something.
SHARES = dict.fromkeys(("science", "reading", "commonsense"), (0.5, 0.1))
USERS = ("jackson", "clinton")


@dataclass(frozen=True)
class Item:
    """One question and its answer as read from a package, before a prompt form is put around it.

    `task` is what the split is made by: items of one task or document never cross a split. `kind` names the set of
    prompt forms, `body` holds the texts a form may place, `answers` one answer by style ("plain" always among them).
    """

    id: str
    task: str
    domain: str
    kind: str
    body: Mapping[str, str]
    answers: Mapping[str, str]
    choices: tuple[str, ...] = ()
    right: int = 0

    @property
    def split(self) -> Split:
        return split_of(self.task, self.domain)

    @property
    def content(self) -> str:
        """Question and plain answer without any prompt form: what the overlap check compares."""
        return " \n ".join([*self.body.values(), self.answers["plain"]])


@dataclass(frozen=True)
class Example:
    """One finished conversation of one domain; user and assistant turns alternate."""

    id: str
    domain: str
    split: Split
    messages: tuple[dict[str, str], ...]
    form: str = ""
    unseen: bool = False

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain of every question-and-answer pair, as `encode` wants it."""
        return (self.domain,) * sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Part:
    """A stretch of a turn: its text, which question-and-answer pair it is of, and whether it is an answer."""

    text: str
    pair: int
    answer: bool


@dataclass(frozen=True)
class MixedExample:
    """A conversation or text of question-and-answer pairs from different domains.

    domains: one name a pair. parts: where a turn holds more than one pair, the parts of each turn, whose texts make up
    its content; else nothing. result: what the answer comes to, where that can be checked (see `both.check`).
    """

    id: str
    split: Split
    messages: tuple[dict[str, str], ...]
    domains: tuple[str, ...] = field(default=())
    parts: tuple[tuple[Part, ...], ...] = ()
    result: str = ""


def split_of(task: str, domain: str = "") -> Split:
    """The split of a task or document id, by sha256: 80% train, 10% validation, 10% test, or as `SHARES` says of its
    domain."""
    train, validation = SHARES.get(domain, (0.8, 0.1))
    fraction = stable_fraction(f"split:{task}")
    if fraction < train:
        return "train"
    return "validation" if fraction < train + validation else "test"


def text_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """The non-empty string under `key`. Raises DataError naming the row (`where`) when there is none."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no text under '{key}'")
    return value.strip()


def write_examples(path: Path, examples: Iterable[Example | MixedExample]) -> None:
    """Writes JSON Lines, one object an example, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as out:
        for example in examples:
            out.write(json.dumps(_as_row(example), ensure_ascii=False) + "\n")
    draft.replace(path)


def read_examples(path: Path) -> list[Example]:
    """Reads `<domain>.<split>.jsonl`. Raises DataError naming the line that is not an example."""
    return [_example(row) for row in _rows(path, ("id", "domain", "split", "messages"))]


def read_mixed(path: Path) -> list[MixedExample]:
    """Reads `mixed.<split>.jsonl`. Raises DataError naming the line that is not a mixed example."""
    return [_mixed(row) for row in _rows(path, ("id", "split", "messages", "domains"))]


def read_conversations(path: Path) -> list[Example | MixedExample]:
    """Reads a file with rows of either kind. Raises DataError naming the line that is of neither."""
    rows = _rows(path, ("id", "split", "messages"), ("domain", "domains"))
    return [_mixed(row) if "domains" in row else _example(row) for row in rows]


def _example(row: Mapping[str, Any]) -> Example:
    return Example(
        id=row["id"],
        domain=row["domain"],
        split=row["split"],
        messages=row["messages"],
        form=row.get("form", ""),
        unseen=row.get("unseen", False),
    )


def _mixed(row: Mapping[str, Any]) -> MixedExample:
    return MixedExample(
        id=row["id"],
        split=row["split"],
        messages=row["messages"],
        domains=tuple(row["domains"]),
        parts=tuple(tuple(Part(*part) for part in turn) for turn in row.get("parts", ())),
        result=row.get("result", ""),
    )


def _as_row(example: Example | MixedExample) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.id, "split": example.split, "messages": list(example.messages)}
    if isinstance(example, MixedExample):
        row["domains"] = list(example.domains)
        if example.parts:
            row["parts"] = [[[part.text, part.pair, part.answer] for part in turn] for turn in example.parts]
        if example.result:
            row["result"] = example.result
        return row
    row = {"id": example.id, "domain": example.domain, "split": example.split, "form": example.form}
    if example.unseen:
        row["unseen"] = True
    return {**row, "messages": list(example.messages)}


def _rows(path: Path, keys: tuple[str, ...], one_of: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} is not there: prepare the data first, or name another folder")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: not a JSON object")
            missing = [key for key in keys if key not in row]
            if one_of and not any(key in row for key in one_of):
                missing.append("' and no '".join(one_of))
            if missing:
                raise DataError(f"{where}: no '{missing[0]}'")
            if row["split"] not in SPLITS:
                raise DataError(f"{where}: split is '{row['split']}', not one of {', '.join(SPLITS)}")
            row["messages"] = _messages(row["messages"], where)
            rows.append(row)
    return rows


def _messages(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list of turns")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: a turn needs a role and a content")
    return tuple(cast("list[dict[str, str]]", messages))
