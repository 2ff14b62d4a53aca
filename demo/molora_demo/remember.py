"""A chat becomes an adapter of its person: what they said of themselves in it is practised as questions and answers.

It serves only if that is then told in wordings that were not practised, and if little of all else is lost.

What was told in earlier chats is practised again. So that it can be, it is kept as sentences beside the version that
learnt it, and goes with it.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from molora.checks import linear_sizes
from molora.errors import MoLoRAError
from molora.versions import Versions
from molora_demo.everyday import HELD, JUDGED
from molora_demo.shelf import Shelf, told_file

NEEDS = ("peft", "bm25s")  # of the extras train and personalize
RANK = 8
LEARNING_RATE = 1e-3
BATCH_TOKENS = 192  # small batches: in as many passes those of 512 take too few steps to learn anything
KNOWN = 24  # facts, the last ones, that are practised again and kept: each takes time
SCRATCH = ".learning-"  # folders in home that last as long as a learning

NOTHING_SAID = "There is nothing to remember yet: chat first, then come back."
NOTHING_TOLD = (
    "You have said nothing of yourself in this chat that could be remembered. It looks for plain sentences in English: "
    "say something of yourself in the Chat tab, such as “My dog is called Biscuit”, “I live in Bergen” or “I love "
    "sailing”, then come back."
)


class Stopped(MoLoRAError):
    """Its person wanted it to end."""


class Said(Protocol):
    """A turn of a chat."""

    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Told:
    """What came of a chat; pairs are before and after.

    Args:
        title: of the adapter. serves: whether the new version serves. why: what the gate says.
        version, size, seconds: of the new version.
        facts: what was understood, as it is to be answered.
        questions: in wordings that were not practised, by which it is judged. right: shares of them that are answered
            with the fact. older: as right, of what was told in earlier chats; None where there is none.
        everyday: by which share the loss on everyday talk is above that without the adapter.
    """

    title: str
    serves: bool
    why: str
    version: int
    size: int
    seconds: float
    facts: tuple[str, ...]
    questions: int
    right: tuple[float, float]
    older: tuple[float, float] | None
    everyday: float


def missing() -> list[str]:
    """What has to be installed first."""
    return [name for name in NEEDS if find_spec(name) is None]


def messages_of(turns: Sequence[Said]) -> list[dict[str, str]]:
    """A chat as messages; what was not answered is left out.

    Raises:
        MoLoRAError: nothing was said.
    """
    found: list[dict[str, str]] = []
    for turn in turns:
        if turn.prompt.strip() and turn.answer.strip():
            found += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
    if not found:
        raise MoLoRAError(NOTHING_SAID)
    return found


def room_for(base: Any, shelf: Shelf, layer: str, title: str) -> int:
    """About how many bytes a new version takes, with the empty first one where the adapter is new."""
    head = base.get_output_embeddings()
    heads = {name for name, module in base.named_modules() if module is head}
    sizes = [size for name, size in linear_sizes(base).items() if name not in heads]
    new = not shelf.folder.is_dir() or shelf.versions(layer, shelf.name_of(layer, title)).root() is None
    return RANK * sum(map(sum, sizes)) * (6 if new else 2)


def learn_chat(
    shelf: Shelf,
    layer: str,
    title: str,
    turns: Sequence[Said],
    epochs: int,
    most_lost: float,
    on_step: Callable[[int, int], None],
) -> Told:
    """Learns a chat on a copy of the base, so that the model that serves is left alone.

    Args:
        shelf: whose. layer, title: of the adapter, which is begun if there is none.
        turns: the chat.
        epochs: passes over what is asked of it.
        most_lost: by which share the loss on everyday talk may grow, and what earlier chats told may be lost.
        on_step: called with the number of finished steps and of all; an error of it ends the learning.

    Returns:
        What came of it. A version that does not serve is gone.

    Raises:
        MoLoRAError: nothing to learn, or it was stopped. What was there before is as it was.
    """
    from molora_training.plum.facts import read_facts, together, write_facts
    from molora_training.plum.learner import Learning
    from molora_training.plum.practice import against, practise
    from molora_training.plum.segments import SegmentWeights
    from molora_training.plum.told import told

    started = time.monotonic()
    facts = told(messages_of(turns))
    if not facts:
        raise MoLoRAError(NOTHING_TOLD)
    shelf.open()
    name = shelf.name_of(layer, title)
    versions = shelf.versions(layer, name)
    before = [version.number for version in versions.all()]
    served = versions.current
    done = False
    try:
        with tempfile.TemporaryDirectory(dir=shelf.home, prefix=SCRATCH) as scratch:
            start, out = versions.path(_start(versions, shelf.base, Path(scratch))), Path(scratch) / "adapter"
            known = together(read_facts(told_file(start)), facts)[-KNOWN:]
            about = {fact.about for fact in facts}
            found = practise(
                shelf.base,
                start,
                out,
                [fact for fact in known if fact.about in about],
                [fact for fact in known if fact.about not in about],
                HELD,
                JUDGED,
                Learning(
                    LEARNING_RATE, epochs, pull=0.0, weights=SegmentWeights(), rank=RANK, batch_tokens=BATCH_TOKENS
                ),
                on_step,
            )
            why = against(found, most_lost)
            made = versions.add(out, command="a chat of the demo", metrics=asdict(found), passed=not why, why=why)
        folder = versions.path(made.number)
        if not why:
            write_facts(told_file(folder), known)
            versions.promote(made.number)
            done = True
        return Told(
            title=title,
            serves=done,
            why=why,
            version=made.number,
            size=sum(one.stat().st_size for one in folder.glob("*.safetensors")),
            seconds=time.monotonic() - started,
            facts=tuple(fact.answer for fact in known if fact.about in about),
            questions=found.questions,
            right=found.right,
            older=found.older,
            everyday=found.everyday,
        )
    finally:
        if not done:
            _undo(shelf, layer, name, served, before)


def _start(versions: Versions, base: str, scratch: Path) -> int:
    """The version to go on from: what serves, or a first one, which does nothing."""
    from molora_training.continual.growth import blank

    if versions.current is not None:
        return versions.current
    if (root := versions.root()) is None:
        blank(base, RANK, scratch / "blank")
        root = versions.add(scratch / "blank", why="it does nothing yet")
    return root.number


def _undo(shelf: Shelf, layer: str, name: str, served: int | None, before: list[int]) -> None:
    versions = shelf.versions(layer, name)
    if versions.current != served and served is not None:
        versions.promote(served)
    if served is None and (shelf.folder / versions.place).is_dir():
        versions.erase()
    shelf.drop(layer, name, before)
