"""Conversations as the browser keeps them: plain lists, the newest first, no more than it has room for."""

import secrets
from collections.abc import Sequence
from typing import Any

from molora_demo.source import Turn

MOST_CHATS = 24
MOST_CHARACTERS = 1 << 20  # of a browser's few megabytes, all of which travel with each save
TITLE = 48

Book = list[dict[str, Any]]
"""[{"id": str, "title": str, "turns": [[prompt, answer, html], ...]}, ...]"""


def new_id() -> str:
    return secrets.token_hex(8)


def saved(book: Any, chat: str, turns: Sequence[Turn]) -> Book:
    """``book`` with the conversation ``chat`` at its beginning; the oldest go where there is no room."""
    kept = [entry for entry in checked(book) if entry["id"] != chat]
    if turns:
        entry = {"id": chat, "title": title(turns), "turns": [[turn.prompt, turn.answer, turn.html] for turn in turns]}
        kept.insert(0, entry)
    kept = kept[:MOST_CHATS]
    while len(kept) > 1 and sum(_size(entry) for entry in kept) > MOST_CHARACTERS:
        kept.pop()
    return kept


def opened(book: Any, chat: str | None) -> list[Turn]:
    """The turns of a conversation; none if it is not there."""
    for entry in checked(book):
        if entry["id"] == chat:
            return [Turn(*turn) for turn in entry["turns"]]
    return []


def listed(book: Any, chat: str) -> list[tuple[str, str]]:
    """(title, id) of every conversation, the one that has just begun at the beginning."""
    found = [(entry["title"], entry["id"]) for entry in checked(book)]
    return found if any(one == chat for _, one in found) else [("New conversation", chat), *found]


def title(turns: Sequence[Turn]) -> str:
    """The beginning of the first question."""
    words = " ".join(turns[0].prompt.split())
    return words if len(words) <= TITLE else f"{words[: TITLE - 1].rstrip()}…"


def checked(book: Any) -> Book:
    """What of ``book`` has the form that is written here: it comes from a browser, where it may have been changed."""
    return [entry for entry in book if _is_entry(entry)] if isinstance(book, list) else []


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and isinstance(entry.get("title"), str)
        and isinstance(entry.get("turns"), list)
        and all(
            isinstance(turn, list) and len(turn) == 3 and all(isinstance(part, str) for part in turn)
            for turn in entry["turns"]
        )
    )


def _size(entry: dict[str, Any]) -> int:
    return sum(len(part) for turn in entry["turns"] for part in turn)
