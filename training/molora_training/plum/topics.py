"""What was talked about in a conversation, told by its own words alone, and what of that is remembered.

Remembered are hashes of stemmed words, and, where earlier conversations are to be rehearsed, the topics by name. The
hashes hide nothing from who tries words one by one: who holds the file can ask it whether a word was talked about, as
the adapter beside it can be asked.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

from molora.atomic import write_text
from molora.errors import DataError
from molora.personalize.bm25 import bm25s
from molora.personalize.history import Interaction
from molora.personalize.retrieval import words
from molora_training.plum.bank import BANK

MOST = 5  # topics of a conversation
LONGEST = 3  # words of a topic

_FORMAT = 2
_SHORTEST_WORD = 3
_ASKED = 2  # what the user's own words count
_MORE_WORDS = 0.25  # by which share each further word makes a topic better
_CODE = re.compile(r"```.*?(?:```|$)", re.DOTALL)
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
# They are not in lists of stop words, and no topic begins by them.
_SPOKEN = """\
able actually also always another anything ask asked away bad best better bit buy can't cannot choose come could day
days different don't easy else even ever every everything example explain find first follow following get getting give
given good got great hello help hey however i'd i'll i'm i've important instead it's kind know last let let's like
little long look lot made make makes making many may maybe mean might much must need needs never new next nice often
okay old one people please put quite really remove right said say see send sentence several short show since small
something sometimes still sure take tell text thank thanks that's there's thing things think time times today together
true try trying two us use used using usually want wanted way ways well what's without won't word work works would
write written year years yes yet
"""
# Longest first: one is taken off.
_ENDINGS = ("ings", "ers", "ies", "ied", "ing", "er", "es", "ed", "ie", "ly", "s", "e", "y")


def topics(messages: Sequence[Mapping[str, str]], most: int = MOST) -> list[str]:
    """What a conversation is about: runs of words that are no stop words, the best first.

    A run's score is the mean of its words', a little more for each further word. A word's is how often it comes, in a
    question twice, times the logarithm of its length, since the rarer a word is the longer. No two topics share a word.

    Args:
        messages: turns; what is said by the system and what is code are left out.
        most: topics at most.

    Returns:
        Fewer, or none, where little is said; the same for the same conversation.
    """
    found = exchanges(messages)
    texts = [(text, weight) for one in found for text, weight in ((one.question, _ASKED), (one.answer, 1))]
    stops = stop_words(" ".join(text for text, _ in texts))
    runs = [(run, weight) for text, weight in texts for run in _runs(text, stops)]
    counts: Counter[str] = Counter()
    for run, weight in runs:
        for word in run:
            counts[stem(word)] += weight
    lower = {word for run, _ in runs for word in run if word == word.lower()}
    candidates: dict[tuple[str, ...], str] = {}
    for run, _ in runs:
        for size in range(1, LONGEST + 1):
            for first in range(len(run) - size + 1):
                some = run[first : first + size]
                shown = " ".join(word.lower() if word.lower() in lower else word for word in some)
                candidates.setdefault(tuple(stem(word) for word in some), shown)

    def score(key: tuple[str, ...]) -> float:
        each = [counts[one] * math.log(1 + len(one)) for one in key]
        return round(sum(each) / len(each) * (1 + _MORE_WORDS * (len(each) - 1)), 9)

    chosen: list[str] = []
    taken: set[str] = set()
    for key in sorted(candidates, key=score, reverse=True):  # of equal ones the earlier
        if len(chosen) < most and len(set(key)) == len(key) and taken.isdisjoint(key):
            chosen.append(candidates[key])
            taken.update(key)
    return chosen


def exchanges(messages: Sequence[Mapping[str, str]]) -> list[Interaction]:
    """The questions of a conversation that have an answer; what one side says in several messages is one turn."""
    spoken = [message for message in messages if message["role"] != "system"]
    turns = [
        (role, "\n\n".join(message["content"] for message in some).strip())
        for role, some in groupby(spoken, key=lambda message: message["role"])
    ]
    return [
        Interaction(asked, said) for (role, asked), (_, said) in pairwise(turns) if role == "user" and asked and said
    ]


def stop_words(text: str) -> frozenset[str]:
    """Those of the language whose stop words come most often in the text, of equal ones English, and words of talk."""
    said = words(text)
    return max(_lists(), key=lambda listed: sum(word in listed for word in said)) | frozenset(_SPOKEN.split())


def stem(word: str) -> str:
    """A word without its ending: rough, and for English; what is cut too much makes more words one."""
    word = word.lower().removesuffix("'s").removesuffix("’s")
    ending = next((one for one in _ENDINGS if word.endswith(one) and len(word) - len(one) >= _SHORTEST_WORD), "")
    word = word.removesuffix(ending)
    return word[:-1] if len(word) > _SHORTEST_WORD and word[-1] == word[-2] else word


def stems(text: str) -> set[str]:
    """The stems of a text's words of three letters and more, stop words left out."""
    stops = _lists()[0] | frozenset(_SPOKEN.split())
    return {stem(word) for word in words(text) if len(word) >= _SHORTEST_WORD and word not in stops}


def discussed(messages: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """What is remembered of a conversation: hashes of its topics' stems, and of its words that the bank knows too."""
    said = stems("\n".join(message["content"] for message in messages if message["role"] != "system"))
    of_bank = frozenset[str]().union(*bank_stems().values())
    of_topics = {one for topic in topics(messages) for one in stems(topic)}
    return frozenset(hashed(one) for one in of_topics | (said & of_bank))


@cache
def bank_stems() -> Mapping[str, frozenset[str]]:
    """The stems of each topic of the bank and of what is near to it, by its name."""
    return {one.name: frozenset(stems(one.near)) for one in BANK}


def hashed(stemmed: str) -> str:
    """sha256 of a stem."""
    return hashlib.sha256(stemmed.encode()).hexdigest()


def read_discussed(file: Path) -> tuple[frozenset[str], list[str]]:
    """The hashes and the topics of a file; none where there is none.

    Raises:
        DataError: it is damaged.
    """
    if not file.is_file():
        return frozenset(), []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        named = found["topics"] if found["format"] == _FORMAT else []  # they came with the second format
        if found["format"] not in (1, _FORMAT) or not all(isinstance(one, str) for one in [*found["sha256"], *named]):
            raise ValueError("another format")
        return frozenset(found["sha256"]), list(named)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is damaged ({error}): delete it, and negatives may be about what was discussed before."
        ) from None


def write_discussed(file: Path, hashes: Iterable[str], named: Iterable[str] = ()) -> None:
    """Writes hashes and topics in place of what is there, sorted, so that they do not tell what came when."""
    said = {"format": _FORMAT, "sha256": sorted(hashes), "topics": sorted(set(named))}
    write_text(file, json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def _runs(text: str, stops: frozenset[str]) -> Iterator[list[str]]:
    """The longest runs of words that are no stop words, with nothing but a space between them."""
    run: list[str] = []
    end = 0
    for found in _WORD.finditer(_CODE.sub("\n", text)):
        word = found[0]
        if run and found.string[end : found.start()] != " ":
            yield run
            run = []
        end = found.end()
        if len(word) >= _SHORTEST_WORD and word.lower() not in stops and not word[0].isdigit():
            run.append(word)
        elif run:
            yield run
            run = []
    if run:
        yield run


@cache
def _lists() -> tuple[frozenset[str], ...]:
    """Stop words by language, English first."""
    stopwords = bm25s("bm25s.stopwords")
    lists = {name: frozenset(listed) for name, listed in vars(stopwords).items() if name.startswith("STOPWORDS_")}
    return lists.pop("STOPWORDS_EN_PLUS"), *lists.values()
