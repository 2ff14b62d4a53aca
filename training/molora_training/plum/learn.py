"""A new version of a user's adapter from conversations, which are gone afterwards.

Each conversation becomes pairs of question and answer about it, and is learnt before the next one is, beside what the
adapter itself says of earlier topics. Of what was said no text stays beside the versions but the names of topics, nor
those where nothing is to be rehearsed. Whether the new version serves is told by the same conversations
in wordings, and with negatives, that nothing was trained on.
"""

import hashlib
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import torch
from filelock import FileLock, Timeout

from molora.base import load_base
from molora.errors import DataError, VersionError
from molora.saved import Saved, load
from molora.versions import Versions
from molora_training.continual.growth import blank
from molora_training.plum.conversations import Conversation, read_conversations
from molora_training.plum.learner import Learner, Learning, Measured
from molora_training.plum.pairs import Pair, augment
from molora_training.plum.rehearsal import beside
from molora_training.plum.topics import discussed, read_discussed, write_discussed

DISCUSSED = "discussed.json"


@dataclass(frozen=True)
class LearnSettings:
    """What is learnt, and by whose adapter.

    Args:
        model: a saved MoLoRA.
        layer, name: of the adapter; the conversations have to be those of the user of that name.
        conversation: JSON Lines, in the order in which they were had.
        learning: how.
        dtype: of the frozen base. None: bfloat16 on a GPU, float32 on a CPU, where it is faster.
    """

    model: Path
    layer: str
    name: str
    conversation: Path
    learning: Learning = field(default_factory=Learning)
    dtype: Literal["bfloat16", "float32"] | None = None


@dataclass(frozen=True)
class Learnt:
    """What came of it.

    conversations: that were learnt. topicless: in which there is nothing to ask about. questions: on which before and
    after are measured, in wordings that were not trained on.
    """

    version: int
    parent: int | None
    promoted: bool
    why: str
    conversations: int
    topicless: int
    questions: int
    before: Measured
    after: Measured
    seconds: float


def learn(settings: LearnSettings, command: str | None = None) -> Learnt:
    """Trains, measures, keeps the new version, and lets it serve if it answers better than what served.

    Args:
        settings: what is learnt. command: to be named in the version.

    Raises:
        StackError, AdapterError: there is no such layer, or the adapter cannot be trained on.
        DataError: a line is refused, or no conversation has a topic.
        VersionError: the router would have to find a new adapter of this layer; another update of it is running.
        NonFiniteError: the loss became infinite; there is no new version.
    """
    started = time.monotonic()
    found = read_conversations(settings.conversation, settings.name)
    versions = Versions(settings.model, settings.layer, settings.name)
    saved = load(settings.model)
    layer = saved.stack[settings.layer]
    if settings.name not in layer.adapters and saved.router is not None and layer.routed:
        raise VersionError(
            f"The router chooses in the layer {layer.name!r}, and has no row for a new adapter there: begin it by "
            f"`molora update {layer.name} {settings.name} --new {settings.learning.rank}`, or take a shared layer."
        )
    place = settings.model / versions.place
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".update.lock", timeout=0):
            return _learn(settings, command, versions, saved, found, started)
    except Timeout:
        raise VersionError(f"Another update of {versions.label} is running.") from None


def pairs_of(
    conversations: Sequence[Conversation], known: frozenset[str], settings: Learning
) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """By conversation, pairs to learn, of all epochs, and those to judge by.

    Args:
        conversations: in their order.
        known: what was discussed in others. settings: of the learning.
    """
    every = known.union(*(discussed(one.messages) for one in conversations))
    taught, apart = [], []
    for number, one in enumerate(conversations):
        chance = Random(f"{settings.seed}/{number}")
        rounds = [augment(one.messages, every, chance, wordings=settings.wordings) for _ in range(settings.epochs)]
        taught.append([pair for pairs in rounds for pair in pairs])
        judge = Random(f"{settings.seed}/{number}/judged")
        apart.append(augment(one.messages, every, judge, held_out=True))
    return taught, apart


def learn_in_turn(
    learner: Learner, taught: Sequence[Sequence[Pair]], earlier: Sequence[str], known: Collection[str]
) -> tuple[int, list[str]]:
    """One conversation after the other, each beside those before it.

    Args:
        learner: of the adapter.
        taught: pairs of each conversation, of all epochs.
        earlier: topics of conversations that it learnt before. known: hashes of all that was discussed.

    Returns:
        The number of steps, and the topics of all conversations.
    """
    steps, topics = 0, list(earlier)
    for pairs in taught:
        if pairs:
            steps += learner.learn(beside(learner, pairs, topics, known), epochs=1, together=2)
            topics += dict.fromkeys(pair.topic for pair in pairs if pair.discussed and pair.topic not in topics)
    return steps, topics


def _learn(
    settings: LearnSettings, command: str | None, versions: Versions, saved: Saved, found: Sequence[Conversation],
    started: float,
) -> Learnt:  # fmt: skip
    file = settings.model / versions.place / DISCUSSED
    known, earlier = read_discussed(file)
    taught, judged = pairs_of(found, known, settings.learning)
    apart = [pair for pairs in judged for pair in pairs]
    if not apart:
        where = found[0].where if len(found) == 1 else settings.conversation.name
        raise DataError(f"{where}: nothing that could be asked about was talked about; a conversation needs a topic.")
    base_name = str(saved.base)
    layer = saved.stack[settings.layer]
    there = settings.name in layer.adapters
    start = Path(layer.adapters[settings.name]) if there else _begun(settings, versions, base_name)
    learner = _learner(settings, base_name, start)
    before = learner.measure(apart)
    every = known.union(*(discussed(one.messages) for one in found))
    steps, topics = learn_in_turn(learner, taught, earlier, every)
    learner.settle()
    after = learner.measure(apart)
    why = against(before, after)
    with tempfile.TemporaryDirectory(prefix="molora-") as scratch:
        learner.write(Path(scratch) / "adapter")
        version = versions.add(
            Path(scratch) / "adapter",
            command=command,
            data={
                "sha256": hashlib.sha256(settings.conversation.read_bytes()).hexdigest(),
                "conversations": len(found),
            },
            metrics={
                "before": asdict(before),
                "after": asdict(after),
                "questions": len(apart),
                "steps": steps,
                "learning": asdict(settings.learning),
            },
            passed=not why,
            why=why or f"{after.right:.0%} of the closed questions are answered right, {before.right:.0%} before",
        )
    # What was talked about was talked about, also where the version that learnt it does not serve; but what serves does
    # not know of it, and would practise what it makes up.
    named = earlier if why else topics
    write_discussed(file, every, named if settings.learning.rehearsed else ())
    if not why:
        versions.promote(version.number)
    return Learnt(
        version=version.number,
        parent=version.parent,
        promoted=not why,
        why=version.why,
        conversations=sum(bool(pairs) for pairs in taught),
        topicless=sum(not pairs for pairs in taught),
        questions=len(apart),
        before=before,
        after=after,
        seconds=round(time.monotonic() - started, 1),
    )


def against(before: Measured, after: Measured) -> str:
    """Why a new version may not serve; nothing if it may."""
    if not after.loss < before.loss:
        return f"nothing was learnt: loss on new wordings {before.loss:.4f} -> {after.loss:.4f}"
    if after.right < before.right:
        return f"fewer closed questions are answered right: {before.right:.0%} -> {after.right:.0%}"
    return ""


def _begun(settings: LearnSettings, versions: Versions, base_name: str) -> Path:
    """The first version of a new adapter, which does nothing: what has to forget all is made anew from it."""
    root = versions.root()
    if root is None:
        with tempfile.TemporaryDirectory() as scratch:
            blank(base_name, settings.learning.rank, Path(scratch) / "blank", settings.learning.seed)
            root = versions.add(Path(scratch) / "blank", why="it does nothing yet")
    return versions.path(root.number)


def _learner(settings: LearnSettings, base_name: str, start: Path) -> Learner:
    cuda = torch.cuda.is_available()
    dtype = settings.dtype or ("bfloat16" if cuda else "float32")
    base, tokenizer = load_base(base_name, dtype=getattr(torch, dtype))
    base.to("cuda" if cuda else "cpu").requires_grad_(False)
    return Learner(base, tokenizer, start, settings.learning, base_name)
