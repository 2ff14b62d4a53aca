"""A version of an adapter that never saw some of what it was updated with.

It is made anew from what was there before all updates and from what is still remembered, so nothing of the rest can be
in it; every version in between goes. That it is gone shows in the loss on it, beside that of the first version, which
never saw it.
"""

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from molora.errors import ConfigError, DataError, VersionError
from molora.key_file import read_key, write_key
from molora.saved import load
from molora.versions import ROW_OF, Versions
from molora_training import adapter
from molora_training.continual.edits import row_again
from molora_training.continual.memory import Memory, key
from molora_training.continual.questions import MEAN, represented
from molora_training.continual.update import (
    MEMORY,
    Change,
    Judge,
    UpdateSettings,
    read_chats,
    training_settings,
    working,
    write_chats,
)

# What is remembered was learnt in its own update and replayed in later ones: about twice the passes of one update. With
# one update's passes alone a companion of ten conversations told 22% of the facts that it was to keep, 59% before, and
# 85% with twice as many (examples/companion.py).
PASSES = 2


@dataclass(frozen=True)
class Forgotten:
    """What came of it.

    gone: conversations that are remembered no more. still: those that are, and were learnt anew. before, after: from
    the first version to what served and to what serves now, on what was to be forgotten. removed: versions that are no
    more.
    """

    version: int
    gone: int
    still: int
    before: Change
    after: Change
    removed: tuple[int, ...]
    seconds: float

    @property
    def left(self) -> float | None:
        """Which share of what was gained on it is gained still, by what is like it; None where nothing was gained."""
        gained = self.before.before - self.before.after
        return (self.after.before - self.after.after) / gained if gained > 0 else None


def forget(settings: UpdateSettings, topic: str | None = None, command: str | None = None) -> Forgotten:
    """Forgets the conversations in ``settings.data``, or those that are remembered and speak of ``topic``.

    Args:
        settings: as of an update; ``general`` and ``max_forgetting`` do not count. What stays is learnt anew, in twice
            as many epochs.
        topic: a word or words, in any case; None: the file says what.
        command: to be named in the version.

    Raises:
        VersionError: the adapter has no versions, so nothing was learnt by updates; or an update is running.
        DataError: nothing of that kind is remembered, or the file holds none.
    """
    started = time.monotonic()
    versions = Versions(settings.model, settings.layer, settings.name)
    root = versions.root()
    if root is None:
        gone = "its first version is gone, so it cannot be made anew: --all takes it away as a whole"
        none = "it serves as it was saved: no update taught it anything to forget"
        raise VersionError(f"{versions.label}: {gone if versions.all() else none}.")
    place = settings.model / versions.place
    try:
        with FileLock(place / ".update.lock", timeout=0):
            memory = Memory.load(place / MEMORY, settings.memory or 1)
            rows = read_chats(settings.data) if topic is None else _about(topic, memory)
            if not rows:
                what = f"{topic!r}" if topic is not None else "them"
                raise DataError(f"Nothing that is remembered for {versions.label} speaks of {what}.")
            return _forget(settings, command, versions, root.number, memory, rows, started)
    except Timeout:
        raise VersionError(f"An update of {versions.label} is running.") from None


def _forget_row(settings: UpdateSettings, rest: Memory) -> None:
    """Where the adapter's row of the router was fitted to what it learnt by updates: the row anew, and no version of
    the router with the old one."""
    routers, label = Versions(settings.model), f"{settings.layer}/{settings.name}"
    if all(version.why != ROW_OF.format(label) for version in routers.all()):
        return
    dtype = getattr(torch, settings.chosen_dtype)
    router = row_again(settings.model, settings.layer, settings.name, rest.taught, dtype)
    made = routers.add(router, why=f"the row for {label} anew")
    routers.promote(made.number)
    routers.drop([one.number for one in routers.all() if label not in (one.router or {}).get("rows", ())])


def speaks_of(row: Mapping[str, Any], topic: str) -> bool:
    """Whether a conversation holds the words of ``topic`` next to one another, in any case."""
    words = topic.split()
    if not words:
        raise ConfigError("A topic is a word or more.")
    said = "\n".join(message["content"] for message in row["messages"])
    return re.search(r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)", said, re.IGNORECASE) is not None


def _about(topic: str, memory: Memory) -> list[Mapping[str, Any]]:
    return [row for row in memory.rows if speaks_of(row, topic)]


def _forget(
    settings: UpdateSettings,
    command: str | None,
    versions: Versions,
    root: int,
    memory: Memory,
    rows: list[Mapping[str, Any]],
    started: float,
) -> Forgotten:
    saved = load(settings.model)
    base, served = str(saved.base), Path(saved.stack[settings.layer].adapters[settings.name])
    rest = memory.without(map(key, rows))
    first = versions.path(root)
    with working(settings.model / versions.place) as work:
        made = first
        if rest.taught:
            write_chats(work / "train.jsonl", rest.taught, settings.name)
            write_chats(work / "validation.jsonl", rest.kept_apart or rest.taught, settings.name)
            training = training_settings(replace(settings, epochs=PASSES * settings.epochs), base, first, work)
            adapter.train(training, resume=False, command=command)
            shutil.rmtree(training.work, ignore_errors=True)
            made = training.out
        before, after = (Judge(settings, base, first, one) for one in (served, made))
        was, now = before(rows), after(rows)
        if was is None or now is None:
            raise DataError(f"Every conversation to be forgotten is over {settings.max_length} tokens long.")
        if saved.stack[settings.layer].keyed and made != first:
            asked = represented(after.model.base, after.encode(rest.taught), 0, settings.batch_tokens)[:, MEAN]
            before_all = read_key(first)
            write_key(made, asked if before_all is None else torch.cat([before_all, asked]))
        version = versions.add(
            made,
            command=command,
            data={"conversations": len(rest.rows), "forgotten": len(rows)},
            metrics={"forgotten": asdict(now)},
            why=f"{len(rows)} conversations were forgotten",
            parent=root,
        )
    versions.promote(version.number)
    _forget_row(settings, rest)
    removed = versions.drop([root])
    for file in (settings.model / versions.place).glob("*.safetensors"):
        file.unlink()  # what a method knew of them
    if (settings.model / versions.place / MEMORY).is_file():
        rest.save(settings.model / versions.place / MEMORY)  # last: an interrupted call finds them again
    return Forgotten(
        version=version.number,
        gone=len(rows),
        still=len(rest.rows),
        before=was,
        after=now,
        removed=tuple(removed),
        seconds=round(time.monotonic() - started, 1),
    )
