"""A user's history: the questions that somebody asked and the answers that were right for them.

Two kinds of file are read, and told apart by their first character.

Conversations are JSON Lines, one ``{"messages": [{"role", "content"}, ...]}`` a line, with ``user`` and ``time`` if
they are known. The benchmarks LaMP and LongLaMP are a JSON array of ``{"id", "input", "profile": [...]}``; gold answers
stand in a file of their own, ``{"task", "golds": [{"id", "output"}, ...]}``, or in the row itself, as LongLaMP has them
on the Hub, where the user is under ``name``, ``author`` or ``reviewerId`` and there may be no ``id``. What a profile's
items hold differs from task to task; `SHAPES` has the keys, which are those that the code published with LaMP, and code
of others for LongLaMP, reads.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from molora.errors import DataError

_ROLES = ("system", "user", "assistant")
_USER_KEYS = ("user", "name", "author", "reviewerId")
_TIME_KEYS = ("date", "time", "year")


@dataclass(frozen=True)
class Interaction:
    """A question, the answer to it and, if known, when it was: a date, a year or a timestamp as the file has it."""

    question: str
    answer: str
    time: str | None = None


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark: what is asked, what its user did before, and the gold answer if it is public."""

    id: str
    input: str
    history: tuple[Interaction, ...]
    output: str | None


@dataclass(frozen=True)
class Shape:
    """How an item of a profile becomes an interaction: a template over its keys, and the key of the answer."""

    question: str
    answer: str
    keys: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.keys, self.answer)


_TITLE_OF_PAPER = Shape("Which title does a paper with this abstract have?\n\n{abstract}", "title", ("abstract",))
_SUBJECT_OF_MAIL = Shape("Which subject does this e-mail have?\n\n{text}", "title", ("text",))

SHAPES: dict[str, Shape] = {
    "LaMP_1": _TITLE_OF_PAPER,  # what is asked there is which of two titles is cited; a profile has no citations
    "LaMP_2": Shape("Which tag do you give this film?\n\n{description}", "tag", ("description",)),
    "LaMP_2_news": Shape("Which category is this article of?\n\n{text}", "category", ("text",)),  # of its first release
    "LaMP_3": Shape("How many stars do you give with this review?\n\n{text}", "score", ("text",)),
    "LaMP_4": Shape("Which headline does this article have?\n\n{text}", "title", ("text",)),
    "LaMP_5": _TITLE_OF_PAPER,
    "LaMP_6": _SUBJECT_OF_MAIL,
    "LaMP_7": Shape("Write a post.", "text"),
    "LongLaMP_email": Shape("Write an e-mail with this subject: {title}", "text", ("title",)),
    "LongLaMP_abstract": Shape("Write the abstract of a paper with this title: {title}", "abstract", ("title",)),
    "LongLaMP_topic": Shape("Write a post of which this is the gist: {summary}", "content", ("summary",)),
    "LongLaMP_review": Shape(
        'Write a review of {overall} stars, in short "{summary}", of this product:\n\n{description}',
        "reviewText",
        ("overall", "summary", "description"),
    ),
}
# The first whose keys an item has is taken where the task is not known by name. A year tells LongLaMP's papers.
_BY_KEYS: tuple[tuple[set[str], str], ...] = (
    ({"reviewText", "overall", "summary", "description"}, "LongLaMP_review"),
    ({"description", "tag"}, "LaMP_2"),
    ({"text", "category"}, "LaMP_2_news"),
    ({"text", "score"}, "LaMP_3"),
    ({"summary", "content"}, "LongLaMP_topic"),
    ({"abstract", "title", "year"}, "LongLaMP_abstract"),
    ({"abstract", "title"}, "LaMP_5"),
    ({"text", "title"}, "LaMP_4"),
    ({"text"}, "LaMP_7"),
)


def read_history(path: str | Path, user: str) -> list[Interaction]:
    """A user's interactions in the order of the file; none when the file is empty.

    Args:
        path: conversations as JSON Lines, or the questions of LaMP or LongLaMP.
        user: whose. Of conversations each line that names a user has to name this one. In a benchmark it is the id of a
            question or the name of a user there.

    Raises:
        DataError: there is no such file, a line is no conversation or is another user's (the line is named), or no
            question of the benchmark is this user's.
    """
    file = Path(path)
    text = _read(file)
    if text.lstrip().startswith("["):
        rows = list(_rows(file, text))
        own = [(where, row) for where, row in rows if user in {str(row.get(key)) for key in ("id", *_USER_KEYS)}]
        if rows and not own:
            raise DataError(f"{file.name} has no question of '{user}': give an id or a user that stands in it.")
        found = [one for where, row in own for one in _profile(row, None, where)]
        return found if len(own) == 1 else list(dict.fromkeys(found))  # each question of a user brings the profile
    # Not splitlines(): texts hold Unicode line separators that do not end a JSON line.
    lines = [(f"{file.name} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [one for where, line in lines for one in _conversation(_object(line, where), user, where)]


def read_lamp(questions: str | Path, golds: str | Path | None = None) -> tuple[str, list[Sample]]:
    """A task of LaMP or LongLaMP: its name and its samples, in the order of the questions.

    Args:
        questions: the file of questions.
        golds: the file of gold answers. Without it the answers are those in the rows, if there are any.

    Returns:
        The name is the gold file's, else that of `SHAPES` which the profiles' keys tell, else "". Tasks that a profile
        cannot tell apart without a gold file are LaMP_1 and LaMP_5, and LaMP_4, LaMP_6 and LongLaMP's e-mails.

    Raises:
        DataError: a file is not there or not of this form, an id comes twice, or the ids of questions and golds differ;
            the row is named.
    """
    file = Path(questions)
    rows = list(_rows(file, _read(file)))
    task, outputs = _golds(Path(golds)) if golds is not None else ("", {})
    samples: dict[str, Sample] = {}
    for number, (where, row) in enumerate(rows):
        own = next((str(row[key]) for key in ("id", *_USER_KEYS) if key in row), str(number))
        name = own if "id" in row or own not in samples else f"{own}-{number}"
        if name in samples:
            raise DataError(f"{where}: the id '{name}' stands there twice.")
        if golds is not None and name not in outputs:
            raise DataError(f"{where}: {Path(golds).name} has no answer for '{name}': give the golds of this file.")
        output = outputs.get(name, _text(row, "output", where) if "output" in row else None)
        samples[name] = Sample(name, _text(row, "input", where), tuple(_profile(row, task, where)), output)
    lost = [name for name in outputs if name not in samples]
    if lost:
        raise DataError(
            f"{file.name} has no question '{lost[0]}', to which there is a gold answer: give its questions."
        )
    return task or _told(rows), list(samples.values())


def _read(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"There is no file {file}: give a file of conversations or of a benchmark's questions.")
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file} is not readable UTF-8 text ({error}).") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object.")
    return row


def _conversation(row: Mapping[str, Any], user: str, where: str) -> Iterator[Interaction]:
    """The pairs of one conversation; a greeting before the first question and a question without answer are none."""
    owner = row.get("user")
    if owner is not None and owner != user:
        raise DataError(f"{where} is of user '{owner}', not of '{user}': give a file of one user's conversations.")
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise DataError(f"{where}: not a conversation, it has no list under 'messages'.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: not a conversation, a message needs a role and a content.")
        if message.get("role") not in _ROLES:
            raise DataError(f"{where}: the role '{message.get('role')}' is none of {', '.join(_ROLES)}.")
    spoken = [message for message in messages if message["role"] != "system"]
    # What one side says in several messages is one turn.
    turns = [
        (role, "\n\n".join(message["content"] for message in some))
        for role, some in groupby(spoken, key=lambda message: message["role"])
    ]
    for (asker, question), (_, answer) in pairwise(turns):
        if asker == "user" and question.strip() and answer.strip():
            yield Interaction(question.strip(), answer.strip(), _time(row, ("time",), where))


def _rows(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) of a benchmark's questions; `where` names the row in errors."""
    try:
        rows = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not JSON ({error}).") from None
    if not isinstance(rows, list):
        raise DataError(f"{file.name} is not a list of questions.")
    for number, row in enumerate(rows, 1):
        where = f"{file.name} question {number}"
        if not isinstance(row, dict) or not isinstance(row.get("profile"), list):
            raise DataError(f"{where}: it needs an input and a list under 'profile'.")
        yield where, row


def _golds(file: Path) -> tuple[str, dict[str, str]]:
    found = _object(_read(file), file.name)
    task, golds = found.get("task"), found.get("golds")
    if not isinstance(task, str) or not isinstance(golds, list):
        raise DataError(f"{file.name} has no gold answers: it needs a name under 'task' and a list under 'golds'.")
    outputs: dict[str, str] = {}
    for number, gold in enumerate(golds, 1):
        where = f"{file.name} gold {number}"
        if not isinstance(gold, dict) or "id" not in gold or "output" not in gold:
            raise DataError(f"{where}: it needs an id and an output.")
        if str(gold["id"]) in outputs:
            raise DataError(f"{where}: the id '{gold['id']}' stands there twice.")
        outputs[str(gold["id"])] = _text(gold, "output", where)
    return task.replace("-", "_"), outputs


def _profile(row: Mapping[str, Any], task: str | None, where: str) -> Iterator[Interaction]:
    for number, item in enumerate(row["profile"], 1):
        at = f"{where}, item {number} of its profile"
        if not isinstance(item, dict):
            raise DataError(f"{at}: not a JSON object.")
        shape = _shape(task, item, at)
        texts = {key: _text(item, key, at) for key in shape.needed}
        yield Interaction(shape.question.format(**texts), texts[shape.answer], _time(item, _TIME_KEYS, at))


def _shape(task: str | None, item: Mapping[str, Any], where: str) -> Shape:
    if task in SHAPES and set(SHAPES[task].needed) <= set(item):
        return SHAPES[task]
    if "email" in (task or "").lower():
        return SHAPES["LongLaMP_email"]
    name = _name(item)
    if name is None:
        raise DataError(
            f"{where}: the keys {', '.join(sorted(item)) or '(none)'} are those of no task of LaMP or LongLaMP."
        )
    return SHAPES[name]


def _name(item: Mapping[str, Any]) -> str | None:
    return next((name for keys, name in _BY_KEYS if keys <= set(item)), None)


def _told(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    return next((_name(item) or "" for _, row in rows for item in row["profile"]), "")


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text or a number as text: ratings are either."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: no text under '{key}'.")
    return str(value).strip()


def _time(row: Mapping[str, Any], keys: Iterable[str], where: str) -> str | None:
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise DataError(f"{where}: its time is neither a text nor a number.")
    return None if value is None else str(value)
