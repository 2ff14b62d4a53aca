"""Ukrainian: the texts of UA-GEC, to be corrected or to be continued."""

import re
from collections.abc import Iterator

from .items import Item
from .packages import UA_GEC, fetch, read_texts
from .text import approx_tokens, collapse, stable_index

FOLDERS = ("ua_gec/data/gec-only/train/", "ua_gec/data/gec-only/test/")
OPENING_TOKENS, ANSWER_TOKENS, FEWEST_TOKENS = 185, 185, 50
# A closing mark stays with its sentence: only the white space is split at.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"”»)]))\s+(?=[\"“«—–(]?\s?[А-ЯІЇЄҐA-Z0-9])")
_ENDED = re.compile(r"[.!?…][\"”»)]*$")


def read_ukrainian() -> Iterator[Item]:
    """Passages with errors and their corrections, and openings with what follows them; a document is one task."""
    archive = fetch(UA_GEC)
    for folder in FOLDERS:
        sources = dict(read_texts(archive, f"{folder}source/"))
        for name, target in read_texts(archive, f"{folder}target/"):
            number, annotator = name.split(".")[:2]
            source = sources.get(f"{number}.src.txt") or sources.get(f"{number}.txt")
            if annotator == "a1" and source is not None:
                yield from items(f"ua-gec-{number}", source, target)


def items(document: str, source: str, target: str) -> Iterator[Item]:
    """The items of one document, given as it was written and as it was corrected."""
    before, after = source.splitlines(), target.splitlines()
    if len(before) == len(after):
        for line, (wrong, right) in enumerate(zip(before, after, strict=True)):
            wrong, right = collapse(wrong), collapse(right)
            fits = FEWEST_TOKENS <= approx_tokens(right) <= ANSWER_TOKENS and approx_tokens(wrong) <= ANSWER_TOKENS
            if fits and wrong != right and _ENDED.search(right):
                name = f"{document}-correct{line}"
                yield Item(name, document, "ukrainian", "correct-ukrainian", {"text": wrong}, {"plain": right})
    rest = [sentence for line in after for sentence in _SENTENCE_END.split(collapse(line)) if sentence]
    number = 0
    while len(rest) > 2:
        name = f"{document}-continue{number}"
        opening, rest = _take(rest, 35 + stable_index(f"opening:{name}", 85))
        answer, rest = _take(rest, 85 + stable_index(f"length:{name}", 65))
        number += 1
        sizes = approx_tokens(opening), approx_tokens(answer)
        if sizes[0] <= OPENING_TOKENS and FEWEST_TOKENS <= sizes[1] <= ANSWER_TOKENS and _ENDED.search(answer):
            yield Item(name, document, "ukrainian", "continue-ukrainian", {"opening": opening}, {"plain": answer})


def _take(rest: list[str], tokens: int) -> tuple[str, list[str]]:
    """Whole sentences from the front until ``tokens`` are reached, and what is left."""
    count = size = 0
    while count < len(rest) and size < tokens:
        size += approx_tokens(rest[count])
        count += 1
    return " ".join(rest[:count]), rest[count:]
