"""Questions that any text has: a name or a number of it is left out, and to be put in.

They keep a network that reads few questions of people from learning those by heart.
"""

import random
import re

from .text import sentences

GAP = "____"
_AROUND = 12  # words that are shown on either side of it
# Names of one or more words, and numbers; what begins a sentence is a name by its place only.
_TOLD = re.compile(r"(?<=[\w,;:] )(?:[A-Z][\w’'-]+(?: [A-Z][\w’'-]+)*|\d[\d,.]*\d|\d)")


def gaps(text: str, chance: random.Random, count: int) -> list[tuple[str, str]]:
    """At most ``count`` questions about ``text``, with their answers, none twice."""
    found = []
    for sentence in sentences(text):
        for told in _TOLD.finditer(sentence):
            before, after = sentence[: told.start()].split(), sentence[told.end() :].split(" ")
            shown = " ".join(before[-_AROUND:]) + f" {GAP}" + " ".join(after[: _AROUND + 1])
            if told[0] not in shown:
                found.append((f"What was left out? {shown}", told[0]))
    found = list(dict.fromkeys(found))
    return chance.sample(found, min(count, len(found)))
