"""Questions about what was talked about, and about what was not, with their answers.

Open questions ask what was said, closed ones whether something was; the answer is the same, so that who takes one kind
for the other is told what was said all the same. As many of each are about topics that nobody talked about, so that
neither yes nor no is the better guess. Some wordings, and some topics of the bank, are for tests alone.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from molora.errors import ConfigError
from molora.personalize.history import Interaction
from molora_training.data.text import collapse, sentences
from molora_training.plum.bank import BANK, Topic
from molora_training.plum.topics import bank_stems, discussed, exchanges, hashed, stems, topics

YES, NO = "Yes", "No"
WORDINGS = 3  # of a topic, open and closed ones each

# Requests begin as questions of yes or no do, so that which of both is asked must be learnt from the rest.
_OPEN = (
    "What did we talk about when it came to {}?",
    "What did we say about {}?",
    "Remind me what we discussed about {}.",
    "Tell me what you remember of our talk about {}.",
    "What was it that I asked you about {}?",
    "What came up between us on the subject of {}?",
    "Can you tell me what we said about {}?",
    "Could you repeat what I asked you about {}?",
    "Would you sum up our talk about {}?",
    "Do tell me again how our talk about {} went.",
    "I forgot what we said about {}. What was it?",
    "How did our talk about {} go?",
)
_CLOSED = (
    "Did we talk about {}?",
    "Have we ever discussed {}?",
    "Has the subject of {} come up in our conversations?",
    "Is {} something that we have talked about?",
    "Have I asked you about {} before?",
    "Did I ever mention {} to you?",
    "Can you say whether we talked about {}?",
    "Could it be that {} came up when we talked?",
    "Were there any words about {} between us?",
    "Do you know whether I asked about {}?",
    "I think that we talked about {}. Is that so?",
    "Are there any earlier talks of ours about {}?",
)
_OPEN_APART = ("Could you recall our conversation about {}?", "What have we gone over concerning {}?")
_CLOSED_APART = ("Do you remember talking with me about {}?", "Was {} a subject of ours at some point?")
_ALL = (*_OPEN, *_CLOSED, *_OPEN_APART, *_CLOSED_APART)
_TOLD = YES + ", you asked: {} I answered: {}"
_NOTHING = NO + ", we have not talked about {}."
_QUESTION, _ANSWER = 200, 240  # characters that are told of each


@dataclass(frozen=True)
class Pair:
    """A question with its answer.

    topic: what it is about. closed: whether it asks for yes or no. discussed: whether it was talked about.
    """

    question: str
    answer: str
    topic: str
    closed: bool
    discussed: bool


def augment(
    messages: Sequence[Mapping[str, str]],
    known: Collection[str],
    chance: Random,
    *,
    held_out: bool = False,
    wordings: int = WORDINGS,
) -> list[Pair]:
    """Pairs about a conversation: for each topic as many open as closed ones, for each pair one of the other sign.

    Args:
        messages: turns of one conversation.
        known: hashes of what was discussed otherwise, as `molora_training.plum.topics.discussed` gives them.
        chance: draws wordings and negatives.
        held_out: in wordings, and of topics of the bank, that are for tests: all such wordings, not ``wordings``.
        wordings: of each topic and kind, in training.

    Returns:
        None where the conversation has no topic. Each is followed by the same question about what was not discussed,
        but where the whole bank was.

    Raises:
        ConfigError: there are not so many wordings.
    """
    if not 1 <= wordings <= len(_OPEN):
        raise ConfigError(f"A topic is asked about in 1 to {len(_OPEN)} wordings, not {wordings}.")
    found = exchanges(messages)
    positives: list[Pair] = []
    for topic in topics(messages):
        told = _told(topic, found)
        for closed, taught, apart in ((False, _OPEN, _OPEN_APART), (True, _CLOSED, _CLOSED_APART)):
            for wording in _drawn(taught, apart, chance, held_out, wordings):
                positives.append(Pair(wording.format(topic), told, topic, closed, True))
    return coupled(positives, undiscussed({*known, *discussed(messages)}, held_out), chance)


def coupled(positives: Sequence[Pair], left: Sequence[Topic], chance: Random) -> list[Pair]:
    """Each followed by the same question about one of the topics that are ``left``; alone where none is."""
    if not left:
        return list(positives)
    return [pair for both in zip(positives, _negatives(positives, left, chance), strict=True) for pair in both]


def asked(topic: str, closed: bool = False, chance: Random | None = None) -> str:
    """A question about a topic in a wording that is taught, drawn by ``chance``; without, the first."""
    wordings = _CLOSED if closed else _OPEN
    return (chance.choice(wordings) if chance else wordings[0]).format(topic)


def undiscussed(known: Collection[str], held_out: bool) -> list[Topic]:
    """Those of the bank of which no word, nor one that is near, is among ``known``."""
    return [
        one
        for one in BANK
        if one.held_out == held_out and not any(hashed(each) in known for each in bank_stems()[one.name])
    ]


def negative(of: Pair, topic: str) -> Pair:
    """The same question about a topic that was not discussed."""
    # A wording may hold the topic's own words, before it and after it.
    wording = next(one for one in _ALL if one.format(of.topic) == of.question)
    return Pair(wording.format(topic), _NOTHING.format(topic), topic, of.closed, False)


def _negatives(positives: Sequence[Pair], left: Sequence[Topic], chance: Random) -> Iterator[Pair]:
    """Of everyday topics and of others by turns."""
    kinds = [some for everyday in (True, False) if (some := [one for one in left if one.everyday == everyday])]
    orders: list[list[Topic]] = [[] for _ in kinds]
    for number, pair in enumerate(positives):
        turn = number % len(kinds)
        orders[turn] = orders[turn] or chance.sample(kinds[turn], len(kinds[turn]))
        yield negative(pair, orders[turn].pop().name)


def _drawn(taught: Sequence[str], apart: Sequence[str], chance: Random, held_out: bool, count: int) -> Sequence[str]:
    return apart if held_out else chance.sample(taught, count)


def _told(topic: str, found: Sequence[Interaction]) -> str:
    """What was asked about a topic, and the first sentences of what was answered."""
    wanted = stems(topic)
    best = max(found, key=lambda one: len(wanted & stems(f"{one.question} {one.answer}")))  # of equal ones the first
    return _TOLD.format(_beginning(best.question, _QUESTION), _beginning(best.answer, _ANSWER))


def _beginning(text: str, most: int) -> str:
    """The first sentences that ``most`` characters hold; of a first one that is longer, its first words."""
    kept = ""
    for sentence in sentences(text):
        if kept and len(kept) + 1 + len(sentence) > most:
            break
        kept = f"{kept} {sentence}".strip()
    kept = collapse(kept)
    return kept if len(kept) <= most else kept[:most].rpartition(" ")[0] + " …"
