"""A chat becomes an adapter of its person: learnt by the product's own way for one conversation (`molora learn`), and
served only if it answers better and if little of everyday talk is lost.

`molora update` wants about twenty conversations, of which it holds a fifth out to judge by; a chat is one. `molora
learn` asks about one conversation in many wordings, and judges by wordings that it did not learn.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from molora.checks import linear_sizes
from molora.errors import MoLoRAError
from molora_demo.shelf import Shelf

NEEDS = ("peft", "bm25s")  # of the extras train and personalize
# Of one short chat on SmolLM2-135M the defaults (0.001, 3 wordings) make an adapter that says yes to everything, after
# 6 epochs and after 14, and the gate refuses it. Slower, in all six wordings, it is nearer to telling what was said
# from what was not; the gate may refuse it still.
LEARNING_RATE = 3e-4
WORDINGS = 6
SCRATCH = ".learning-"  # folders in home that last as long as a learning

# What nobody teaches here: how much worse such is foretold afterwards is what was lost.
EVERYDAY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days does a week have?", "A week has seven days."),
    ("What colour is the sky on a clear day?", "On a clear day the sky is blue."),
    ("How do I boil an egg?", "Put the egg into boiling water and take it out after eight minutes."),
    ("What do plants need to grow?", "Plants need light, water, air and soil with nutrients."),
    ("Write one sentence about the sea.", "The sea is wide, salty and never quite still."),
    ("What is two plus three?", "Two plus three is five."),
    ("Name three animals that live on a farm.", "Cows, sheep and chickens live on a farm."),
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
    """What came of a chat.

    Args:
        title: of the adapter. serves: whether the new version serves. why: what the gate says.
        version, size, seconds: of the new version.
        questions: in wordings that were not learnt, by which it is judged.
        yes: shares that are answered right where it was talked about, before and after. no: where it was not.
        everyday: by which share the loss on everyday talk grew; None where that was not measured.
    """

    title: str
    serves: bool
    why: str
    version: int
    size: int
    seconds: float
    questions: int
    yes: tuple[float, float]
    no: tuple[float, float]
    everyday: float | None


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
        raise MoLoRAError("There is nothing to remember yet: chat first, then come back.")
    return found


def room_for(base: Any, shelf: Shelf, layer: str, title: str) -> int:
    """About how many bytes a new version takes, with the empty first one where the adapter is new."""
    from molora_training.plum.learner import Learning

    head = base.get_output_embeddings()
    heads = {name for name, module in base.named_modules() if module is head}
    sizes = [size for name, size in linear_sizes(base).items() if name not in heads]
    new = not shelf.folder.is_dir() or shelf.versions(layer, shelf.name_of(layer, title)).root() is None
    return Learning().rank * sum(map(sum, sizes)) * (6 if new else 2)


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
        most_lost: by which share the loss on everyday talk may grow.
        on_step: called with the number of finished steps and of all; an error of it ends the learning.

    Returns:
        What came of it. A version that does not serve is gone.

    Raises:
        MoLoRAError: nothing to learn, or it was stopped. What was there before is as it was.
    """
    from molora_training.plum.learn import LearnSettings, learn
    from molora_training.plum.learner import Learning

    started = time.monotonic()
    messages = messages_of(turns)
    shelf.open()
    name = shelf.name_of(layer, title)
    versions = shelf.versions(layer, name)
    before = [version.number for version in versions.all()]
    served = versions.current
    done = False
    try:
        with tempfile.TemporaryDirectory(dir=shelf.home, prefix=SCRATCH) as scratch:
            file = Path(scratch) / "chat.jsonl"
            file.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            how = Learning(epochs=epochs, learning_rate=LEARNING_RATE, wordings=WORDINGS)
            settings = LearnSettings(shelf.folder, layer, name, file, how)
            found = learn(settings, "a chat of the demo", on_step)
        why, refused, everyday = found.why, "", None
        if found.promoted:
            everyday, refused = _everyday(shelf, layer, name, found.version, most_lost)
            why = refused or why
        done = found.promoted and not refused
        folder = versions.path(found.version)
        return Told(
            title=title,
            serves=done,
            why=why,
            version=found.version,
            size=sum(one.stat().st_size for one in folder.glob("*.safetensors")),
            seconds=time.monotonic() - started,
            questions=found.questions,
            yes=(found.before.positives or 0.0, found.after.positives or 0.0),
            no=(found.before.negatives or 0.0, found.after.negatives or 0.0),
            everyday=everyday,
        )
    finally:
        if not done:
            _undo(shelf, layer, name, served, before)


def _undo(shelf: Shelf, layer: str, name: str, served: int | None, before: list[int]) -> None:
    versions = shelf.versions(layer, name)
    if versions.current != served and served is not None:
        versions.promote(served)
    if served is None and (shelf.folder / versions.place).is_dir():
        versions.erase()
    shelf.drop(layer, name, before)


def _everyday(shelf: Shelf, layer: str, name: str, number: int, most_lost: float) -> tuple[float, str]:
    """By which share the loss on everyday talk grew since the adapter's first version, and why that is too much."""
    from molora_training.continual.update import Judge, UpdateSettings, refusal

    versions: Any = shelf.versions(layer, name)
    root = versions.root()
    settings = UpdateSettings(shelf.folder, layer, name, shelf.folder, max_forgetting=most_lost)
    judge = Judge(settings, shelf.base, versions.path(root.number), versions.path(number))
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in EVERYDAY
    ]
    change = judge(rows)
    assert change is not None
    return change.growth, refusal(most_lost, None, None, change)
