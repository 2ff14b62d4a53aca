"""Small helpers on plain text: length estimates, sentences, cutting at a sentence end, stable hashes."""

import hashlib
import re

# About what a byte-pair vocabulary makes of English, LaTeX and code; within 15% of SmolLM2's for nearly every text.
# Of Cyrillic it makes about a token of every letter.
_TOKEN = re.compile(r"\d|[\u0400-\u04ff]|[^\W\d_]{1,7}|[^\w\s]|\n+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’')\]]*\s+(?=[\"“‘'(\[]?[A-Z0-9§$])")
# A full stop after one of these does not end a sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Gen|Gov|Sen|Rep|Hon|No|Nos|Inc|Co|Corp|Ltd|Jr|Sr|vs|v|al|Art|Sec|Messrs|e\.g|i\.e|cf|Dep"
    r"|Supp|Cir|Fed|App|Ref|Fig|approx)|\b[A-Z])\.$"
)


def stable_fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`: the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def stable_index(key: str, size: int) -> int:
    """An index in [0, size) that depends on nothing but `key`."""
    return int(stable_fraction(key) * size)


def approx_tokens(text: str) -> int:
    """A quick estimate of how many tokens a text has, without a tokenizer."""
    return len(_TOKEN.findall(text))


def collapse(text: str) -> str:
    """The text on one line: every run of white space becomes one space."""
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Splits running English text into sentences; joined with spaces they give the collapsed text back."""
    found: list[str] = []
    start = 0
    text = collapse(text)
    for match in _SENTENCE_END.finditer(text):
        sentence = text[start : match.end()].strip()
        if _ABBREVIATION.search(sentence):
            continue
        found.append(sentence)
        start = match.end()
    if text[start:]:
        found.append(text[start:])
    return found


def cut(text: str, tokens: int) -> str:
    """The longest run of whole sentences from the start that fits `tokens`; empty when the first one does not fit."""
    kept: list[str] = []
    size = 0
    for sentence in sentences(text):
        size += approx_tokens(sentence)
        if size > tokens:
            break
        kept.append(sentence)
    return " ".join(kept)
