"""Questions that any text has: a name, a number or a phrase of it is left out, and to be put in; or a sentence of it is
begun, and to be gone on with.

They keep a network that reads few questions of people from learning those by heart. Each of the four kinds comes as
often as the others, whatever a text has more of.
"""

import random
import re

from .text import sentences

GAP = "____"
_AROUND = (5, 12)  # words that are shown on either side of it
_BEGUN, _FEWEST, _MOST = 6, 4, 10  # words of a sentence that are given, and that follow
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_KINDS = (
    # Names of one or more words; what begins a sentence is a name by its place only.
    re.compile(r"(?<=[\w,;:] )(?!I\b)[A-Z][\w’'-]+(?: (?:of (?:the )?)?[A-Z][\w’'-]+)*"),
    # Dates, and numbers with their unit.
    re.compile(
        rf"(?<=[\w,;:] )(?:{_MONTH} \d\d?(?:st|nd|rd|th)?(?:,? \d{{4}})?|\d\d?(?:st|nd|rd|th)? {_MONTH}(?:,? \d{{4}})?"
        rf"|{_MONTH} \d{{4}}|[$£€]?\d(?:[\d,.]*\d)?(?:st|nd|rd|th|%)?(?: (?:million|billion|thousand|percent))?)(?!\w)"
    ),
    # What stands between an article and a mark, or a word that only joins.
    re.compile(
        r"(?<=\b(?:the|his|her|its|our) )(?:[a-z][a-z-]+ ){0,2}[a-z][a-z-]{2,}"
        r"(?=[,.;:]| (?:of|in|on|to|for|and|or|that|was|were|is|are|had|has|with|at|from|as|who|which)\b)"
    ),
)


def gaps(text: str, chance: random.Random, count: int) -> list[tuple[str, str]]:
    """At most ``count`` questions about ``text``, with their answers, none twice."""
    said = sentences(text)
    kinds = [
        [_left_out(sentence, told, chance) for sentence in said for told in kind.finditer(sentence)] for kind in _KINDS
    ]
    kinds.append([_begun(sentence) for sentence in said])
    left = [list(dict.fromkeys(one for one in some if one is not None)) for some in kinds]
    found: list[tuple[str, str]] = []
    while len(found) < count and any(left):
        some = chance.choice([some for some in left if some])
        found.append(some.pop(chance.randrange(len(some))))
    return found


def _left_out(sentence: str, told: re.Match[str], chance: random.Random) -> tuple[str, str] | None:
    """None where the rest of the sentence has it."""
    around = chance.randint(*_AROUND)  # one wording would teach to look for it
    before, after = sentence[: told.start()], sentence[told.end() :]
    if told[0] in before or told[0] in after:
        return None
    shown = " ".join(before.split()[-around:]) + f" {GAP}" + " ".join(after.split(" ")[: around + 1])
    return f"What was left out? {shown}", told[0]


def _begun(sentence: str) -> tuple[str, str] | None:
    """None where little would follow."""
    words = sentence.split()
    if len(words) < _BEGUN + _FEWEST:
        return None
    return f"How does it go on? {' '.join(words[:_BEGUN])}", " ".join(words[_BEGUN : _BEGUN + _MOST])
