"""A bounded memory of conversations: an even sample of all that came, whatever their number and order.

Each conversation has a place in an order that its own text decides. Kept are the first ones of it, as many as fit; so
a conversation that comes twice counts once, two memories merge by being put together, and nothing but the kept ones has
to be known. A fifth of them is never trained on: on those forgetting is measured.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.atomic import write_text
from molora.errors import ConfigError, DataError
from molora_training.data.text import stable_fraction

BYTES = 2**20
HELD_OUT = 0.2  # of all, by the text alone
LARGEST = 1 / 8  # of a memory that one conversation may fill; larger ones are not kept


@dataclass(frozen=True)
class Memory:
    """Conversations, as rows of data files (`messages` and what else they hold).

    Args:
        rows: in their order, each once.
        limit: bytes of the file at most.
    """

    rows: tuple[Mapping[str, Any], ...] = ()
    limit: int = BYTES

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"A memory holds at least one byte, not {self.limit}.")

    def with_(self, rows: Iterable[Mapping[str, Any]]) -> "Memory":
        """This one after more has come."""
        every = {key(row): row for row in (*self.rows, *rows)}
        kept, size = [], 0
        for _, row in sorted(every.items()):
            own = len(_line(row).encode())
            if own > LARGEST * self.limit:
                continue
            size += own
            if size > self.limit:
                break  # and none that comes later in the order, or what is kept would depend on what came when
            kept.append(row)
        return Memory(tuple(kept), self.limit)

    def without(self, keys: Iterable[str]) -> "Memory":
        """This one without the conversations of these keys (see :func:`key`)."""
        gone = set(keys)
        return Memory(tuple(row for row in self.rows if key(row) not in gone), self.limit)

    @property
    def taught(self) -> list[Mapping[str, Any]]:
        """What may be trained on."""
        return [row for row in self.rows if not held_out(row)]

    @property
    def kept_apart(self) -> list[Mapping[str, Any]]:
        """What is never trained on."""
        return [row for row in self.rows if held_out(row)]

    def save(self, file: Path) -> None:
        """Writes it in place of what is there, at once."""
        write_text(file, "".join(map(_line, self.rows)))

    @classmethod
    def load(cls, file: Path, limit: int = BYTES) -> "Memory":
        """What was saved; an empty one where nothing is. More than ``limit`` is left out.

        Raises:
            DataError: a row that is no conversation; its line is named.
        """
        if not file.is_file():
            return cls(limit=limit)
        rows: list[Mapping[str, Any]] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                key(row)
            except (ValueError, TypeError, KeyError):
                raise DataError(f"{file}, line {number} is no conversation.") from None
            rows.append(row)
        return cls(limit=limit).with_(rows)


def key(row: Mapping[str, Any]) -> str:
    """A hash of what was said, by which a conversation is known without its text."""
    said: Sequence[Mapping[str, str]] = row["messages"]
    text = json.dumps([[message["role"], message["content"]] for message in said], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def held_out(row: Mapping[str, Any]) -> bool:
    """Whether a conversation is one of those that are never trained on, in every memory and every update."""
    return stable_fraction(f"held out:{key(row)}") < HELD_OUT


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"
