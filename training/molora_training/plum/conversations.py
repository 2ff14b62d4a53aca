"""One user's conversations, each as a whole, in the order in which they were had."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molora.errors import DataError
from molora.personalize.history import read_history
from molora_training.data.lessons import Lesson
from molora_training.plum.topics import exchanges


@dataclass(frozen=True)
class Conversation:
    """where: the file's name and the line, for errors. messages: its turns."""

    where: str
    messages: tuple[dict[str, str], ...]


def about_texts(lessons: Sequence[Lesson], most: int = 4) -> list[Conversation]:
    """Made up of texts with questions: somebody shows each, and asks ``most`` questions about it at most. Texts with
    fewer than two are left out."""
    found = []
    for number, lesson in enumerate(lessons):
        if len(lesson.questions) >= 2:
            messages: list[dict[str, str]] = []
            for question, answer in lesson.questions[:most]:
                asked = question if messages else f"{lesson.text}\n\n{question}"
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            found.append(Conversation(f"text {number}", tuple(messages)))
    return found


def read_conversations(file: Path, user: str) -> list[Conversation]:
    """The conversations of JSON Lines, of which each line that names a user has to name this one.

    Raises:
        DataError: there is no such file, it is empty, or a line is no conversation, is another user's, or has no
            question with an answer; the line is named.
    """
    read_history(file, user)
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise DataError(f'{file} is empty: give conversations, a {{"messages": [...]}} a line.')
    if text.lstrip().startswith("["):
        raise DataError(f'{file} is a list: give conversations, a {{"messages": [...]}} a line.')
    found = []
    # Not splitlines(): texts hold Unicode line separators that do not end a JSON line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file.name} line {number}"
            messages = tuple({"role": one["role"], "content": one["content"]} for one in json.loads(line)["messages"])
            if not exchanges(messages):
                raise DataError(f"{where}: a conversation without an answer: leave it out, or give its answers.")
            found.append(Conversation(where, messages))
    return found
