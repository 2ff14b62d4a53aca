"""An adapter practises what a person said of themselves, beside what it was told earlier, and is held to the base's
words in everything else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molora.base import load_base
from molora_training.continual.steady import Steady
from molora_training.data import Encoded, Example, encode_within
from molora_training.plum.facts import Fact
from molora_training.plum.learner import Learner, Learning
from molora_training.plum.pairs import Pair

TOKENS = 32  # of an answer in which a fact is looked for
HELD = 8  # tokens of an answer that the adapter is held by: in the first ones it turns out whose name is told
LENGTH = 256  # tokens of a conversation that the adapter is held by

Exchange = tuple[str, str]


@dataclass(frozen=True)
class Practised:
    """What came of it; pairs are before and after.

    questions: in wordings that were not learnt, by which the new facts are judged. loss: nats a token of their answers.
    right: share of them that are answered with the fact, by greedy decoding. older: as ``right`` of the facts that
    were told earlier, None where there are none. everyday: by which share the loss on everyday talk is above that of
    the base. steps: that were taken.
    """

    questions: int
    loss: tuple[float, float]
    right: tuple[float, float]
    older: tuple[float, float] | None
    everyday: float
    steps: int


def practise(
    base: str,
    start: Path,
    out: Path,
    facts: Sequence[Fact],
    older: Sequence[Fact],
    held: Sequence[str],
    everyday: Sequence[Exchange],
    learning: Learning,
    on_step: Callable[[int, int], None] | None = None,
) -> Practised:
    """Goes on from the adapter in ``start`` and writes what comes of it to ``out``.

    Args:
        base: of the adapter.
        facts: to learn. older: told earlier, to be practised again.
        held: questions that it is to go on answering as the base does. everyday: exchanges that judge whether it does.
        learning: how. on_step: see :meth:`~molora_training.plum.learner.Learner.learn`.

    Raises:
        AdapterError: the adapter cannot be read, or is not this base's.
        NonFiniteError: the loss became infinite.
    """
    cuda = torch.cuda.is_available()
    model, tokenizer = load_base(base, dtype=torch.bfloat16 if cuda else torch.float32)
    model.to("cuda" if cuda else "cpu").requires_grad_(False)
    learner = Learner(model, tokenizer, start, learning, base)
    apart, talk = pairs_of(facts, taught=False), [Pair(*one, "", False, True) for one in everyday]
    with learner.off():
        usual = learner.measure(talk).loss
        # In its own words: those of others it would not have begun with.
        said = list(zip(held, learner.answers(held, HELD), strict=True))
    before = learner.measure(apart).loss, share_right(learner, facts), share_right(learner, older)
    steady = Steady(None, encoded(said, tokenizer))
    steps = learner.learn([*pairs_of(facts), *pairs_of(older)], on_step, steady)
    learner.settle()
    after = learner.measure(apart).loss, share_right(learner, facts), share_right(learner, older)
    learner.write(out)
    return Practised(
        questions=len(apart),
        loss=(before[0], after[0]),
        right=(before[1], after[1]),
        older=(before[2], after[2]) if older else None,
        everyday=learner.measure(talk).loss / usual - 1,
        steps=steps,
    )


def against(found: Practised, most: float) -> str:
    """Why a new version may not serve; nothing if it may.

    Args:
        found: what came of it.
        most: the share by which everyday loss may grow, and that of what was told earlier which may be lost.
    """
    (before, after), (had, has) = found.loss, found.right
    if not (after < before and has >= had and has > 0):
        return f"nothing was learnt: {has:.0%} of the new questions are answered right, {had:.0%} before"
    if not found.everyday <= most:
        return f"it would be {found.everyday:.1%} worse at everyday talk, which may be {most:.1%} at most"
    if found.older is not None and found.older[1] < (1 - most) * found.older[0]:
        was, now = found.older
        return f"too much of what was told earlier is lost: {now:.0%} of it is answered right, {was:.0%} before"
    return ""


def pairs_of(facts: Sequence[Fact], taught: bool = True) -> list[Pair]:
    """In the wordings that are learnt, or in those that judge."""
    return [
        Pair(question, fact.answer, fact.about, False, True)
        for fact in facts
        for question in (fact.taught if taught else fact.apart)
    ]


def share_right(learner: Learner, facts: Sequence[Fact]) -> float:
    """The share of the questions in wordings that were not learnt that are answered with the fact."""
    asked = [(question, fact) for fact in facts for question in fact.apart]
    said = learner.answers([question for question, _ in asked], TOKENS)
    return sum(fact.is_in(one) for one, (_, fact) in zip(said, asked, strict=True)) / max(1, len(asked))


def encoded(exchanges: Sequence[Exchange], tokenizer: Any) -> list[Encoded]:
    """As what an adapter is held by."""
    examples = [
        Example(str(n), "everyday", "train", ({"role": "user", "content": q}, {"role": "assistant", "content": a}))
        for n, (q, a) in enumerate(exchanges)
    ]
    return encode_within(examples, tokenizer, LENGTH, ["everyday"])
