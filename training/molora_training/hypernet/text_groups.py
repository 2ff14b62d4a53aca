"""The groups to learn from: each one's conversations, and the texts that stand for it."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.errors import DataError
from molora.personalize.from_text import TextEncoder, embed
from molora_training.adapter_run import answer_count
from molora_training.data import Encoded, encode_within, read_conversations
from molora_training.data.text import stable_fraction
from molora_training.hypernet.text_settings import GroupFiles

TEXTS, TRAIN, VALIDATION = ".texts.json", ".train.jsonl", ".validation.jsonl"
HELD_OUT_FILE = "held-out.json"
_HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class Group:
    """A user, or a task. train: nothing of a group that is held out. embeddings: float32 [texts, E]."""

    name: str
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    embeddings: Tensor


@dataclass(frozen=True)
class Groups:
    """Those that are learnt from, and those that are not."""

    trained: Sequence[Group]
    held_out: Sequence[Group]
    files: Sequence[Path]
    """What was read."""

    def others(self, group: Group) -> list[Group]:
        """Groups whose texts are wrong for ``group``: of its own kind, where it has such."""
        own = self.held_out if group in self.held_out else self.trained
        others = [other for other in own if other is not group]
        return others or [other for other in (*self.trained, *self.held_out) if other is not group]


def read_groups(files: GroupFiles, tokenizer: Any, encoder: TextEncoder) -> Groups:
    """Reads all groups of a folder and embeds their texts, all at once.

    Raises:
        DataError: a file is missing or not what it should be, a group that is to be held out is not there, or too few
            groups are.
    """
    names = sorted(file.name.removesuffix(TEXTS) for file in files.folder.glob(f"*{TEXTS}"))
    held_out = _held_out(files, names)
    if len(names) < 2 or len(held_out) == len(names):
        raise DataError(
            f"{files.folder} holds {len(names)} groups (<group>{TEXTS}), of which {len(held_out)} are held out: there "
            f"must be 2, and one to learn from."
        )
    texts = {name: _texts(files.folder / f"{name}{TEXTS}") for name in names}
    embeddings = embed(encoder, [text for name in names for text in texts[name]])
    parts = dict(zip(names, embeddings.split([len(texts[name]) for name in names]), strict=True))
    read: list[Path] = [files.folder / f"{name}{TEXTS}" for name in names]

    def rows(name: str, ending: str) -> list[Encoded]:
        read.append(files.folder / f"{name}{ending}")
        return _rows(read[-1], tokenizer, files.max_length)

    trained: list[Group] = []
    others: list[Group] = []
    for name in names:
        out = name in held_out
        train = [] if out else rows(name, TRAIN)
        group = Group(name, train, rows(name, VALIDATION)[: files.validate], parts[name])
        (others if out else trained).append(group)
    return Groups(trained, others, read)


def draw(groups: Sequence[Group], count: int, conversations: int, rng: random.Random) -> list[tuple[Group, Any, Any]]:
    """What a step learns from: groups in proportion to the square root of their size (arXiv 2510.16282), for each the
    embedding [E] of one of its texts and some of its conversations."""
    weights = [len(group.train) ** 0.5 for group in groups]
    return [
        (
            group,
            group.embeddings[rng.randrange(len(group.embeddings))],
            rng.sample(group.train, min(conversations, len(group.train))),
        )
        for group in rng.choices(groups, weights, k=count)
    ]


@dataclass(frozen=True)
class Judged:
    """Validation conversations, with the text of each by how right it is: float32 [rows, E], None for no adapter."""

    rows: Sequence[Encoded]
    embeddings: dict[str, Tensor | None]


def judged(groups: Groups, which: Sequence[Group], seed: int) -> Judged:
    """The validation of the groups ``which``.

    - right: a text of the group
    - shuffled: a text of another group
    - random: a random direction, as long as texts' embeddings are on average
    - none: no adapter
    """
    rows = [row for group in which for row in group.validation]
    right, shuffled = [], []
    for group in which:
        rng = random.Random(f"{seed}/shuffled/{group.name}")
        for number in range(len(group.validation)):
            right.append(group.embeddings[number % len(group.embeddings)])
            wrong = rng.choice(groups.others(group)).embeddings
            shuffled.append(wrong[rng.randrange(len(wrong))])
    length = torch.stack(right).norm(dim=1).mean()
    noise = torch.randn(len(rows), len(right[0]), generator=torch.Generator().manual_seed(seed))
    found = {"right": torch.stack(right), "shuffled": torch.stack(shuffled)}
    return Judged(rows, {**found, "random": torch.nn.functional.normalize(noise, dim=1) * length, "none": None})


def _held_out(files: GroupFiles, names: Sequence[str]) -> set[str]:
    named, note = files.held_out, files.folder / HELD_OUT_FILE
    if named is None and note.is_file():
        named = tuple(json.loads(note.read_text(encoding="utf-8")))
    if not isinstance(named, tuple):
        share = _HELD_OUT if named is None else named
        return {name for name in names if stable_fraction(f"held out:{name}") < share}
    for name in named:
        if name not in names:
            raise DataError(f"{files.folder} holds no {name}{TEXTS}, and {name} is to be held out.")
    return set(named)


def _texts(file: Path) -> list[str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is not readable JSON ({error}).") from error
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"{file} must hold a list of texts, none of them empty.")
    return found


def _rows(file: Path, tokenizer: Any, max_length: int) -> list[Encoded]:
    examples = read_conversations(file)
    names = sorted({domain for example in examples for domain in example.domains})
    rows = [row for row in encode_within(examples, tokenizer, max_length, names) if answer_count(row)]
    if not rows:
        raise DataError(f"{file} holds no conversation with an answer within {max_length} tokens.")
    return rows
