"""A new version of a router after adapters came or went, or for new text, which serves only if it still finds the old.

The router that serves is trained on for a short while on the data that is there, mixed as a router's training is.
Of adapters without data it keeps what its samples say (:mod:`~molora_training.continual.sketches`), and then the rows
of the others alone are trained. Before and after, held-out text says which share of each domain's tokens goes to its
own adapter, and how many go elsewhere than before.
"""

import copy
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from molora import MoLoRAModel, Router
from molora.chat import render
from molora.errors import ConfigError, DataError, VersionError
from molora.router import NEVER
from molora.saved import load
from molora.stack import AUTO
from molora.versions import Versions
from molora_training import router
from molora_training.continual.probe import Probe
from molora_training.continual.sketches import Sketches, found
from molora_training.data import read_examples
from molora_training.router_settings import RouterTrainSettings, learnt_null_start

PROBED = 24  # held-out conversations of each domain
PROBED_MIXED = 60
FITTED = 128  # examples that a row begins with
RATE, ROWS_RATE = 1e-3, 3e-3  # where all is trained, and new rows alone


@dataclass(frozen=True)
class RouterUpdateSettings:
    """One update of a router.

    Args:
        model: a saved MoLoRA with a learned router.
        data: prepared data of its adapters, or of some: `<adapter>.train.jsonl` and `.validation.jsonl`.
        learning_rate: None: RATE, or ROWS_RATE where some have no data.
        max_forgetting: how many of a domain's tokens, as a share of all of them, may be found less than before.
        mixed, documents, in_a_turn, asides: texts of several domains in the training.
    """

    model: Path
    data: Path
    max_forgetting: float = 0.02
    mixed: int = 300
    documents: int = 200
    in_a_turn: int = 200
    asides: int = 100
    epochs: int = 1
    learning_rate: float | None = None
    batch_tokens: int = 4096
    max_length: int = 2048
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.max_forgetting < 0:
            raise ConfigError("max_forgetting must not be negative.")


@dataclass(frozen=True)
class RouterUpdated:
    """What came of it.

    right: of each domain the share of held-out tokens that go to its adapter, before and after; of those in
    ``sampled``, which have no data here, of the router's samples. mixed: the same of text that changes its domain.
    drift: the share of all tokens of held-out text that go elsewhere than before.
    """

    version: int
    parent: int | None
    promoted: bool
    why: str
    right: dict[str, tuple[float, float]]
    sampled: list[str]
    mixed: tuple[float, float]
    drift: float
    seconds: float


def update_router(settings: RouterUpdateSettings, command: str | None = None) -> RouterUpdated:
    """Trains, measures, keeps the new version, and lets it serve if it passed.

    Raises:
        VersionError: the saved MoLoRA has no learned router, or an update of it is running.
        DataError: no data of its adapters, or it does not fit them; or an adapter has none, and the router no samples.
    """
    started = time.monotonic()
    versions = Versions(settings.model)
    if not isinstance(load(settings.model).router, Router):
        raise VersionError(f"{settings.model} has no learned router to go on from: `molora train router` makes one.")
    place = settings.model / versions.place
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".update.lock", timeout=0):
            return _update(settings, command, versions, started)
    except Timeout:
        raise VersionError("Another update of the router is running.") from None


def _update(settings: RouterUpdateSettings, command: str | None, versions: Versions, started: float) -> RouterUpdated:
    model = MoLoRAModel.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    known, without = with_text(model, settings.data)
    probe = Probe(
        model.tokenizer, settings.data, known, single=PROBED, mixed=PROBED_MIXED, max_length=settings.max_length,
        batch_tokens=settings.batch_tokens,
    )  # fmt: skip
    served: Any = model.router
    before, sampled = probe.choices(model), {row: found(served, row) for row in without}
    new, metrics = go_on(model, settings, known, without, command)
    model.set_router(new)
    after = probe.choices(model)
    right = {name: (probe.right(before, name), probe.right(after, name)) for name in known}
    of_samples = {row.partition("/")[2]: (share, found(new, row)) for row, share in sampled.items()}
    mixed = probe.right(before, None), probe.right(after, None)
    drift = float((before != after).float().mean())
    why = _against(settings, right, of_samples, mixed)
    right |= of_samples
    version = versions.add(
        new.cpu(),
        command=command,
        data={"domains": metrics["domains"], "conversations": metrics["train_conversations"]},
        metrics={"right": right, "mixed": mixed, "drift": drift, "steps": metrics["steps"]},
        passed=not why,
        why=why or f"{mixed[1] - mixed[0]:+.1%} of the tokens of mixed text go right",
    )
    if not why:
        versions.promote(version.number)
    return RouterUpdated(
        version.number, version.parent, not why, version.why, right, list(of_samples), mixed, drift,
        round(time.monotonic() - started, 1),
    )  # fmt: skip


def go_on(
    model: MoLoRAModel,
    settings: RouterUpdateSettings,
    known: Sequence[str],
    without: Sequence[str],
    command: str | None = None,
) -> tuple[Router, dict[str, Any]]:
    """The router of ``model`` after a short training, and the metrics of that.

    Args:
        model: whose rows that "auto" cannot choose yet are fitted to examples.
        settings: ``model`` of them is not read but for how many first tokens its router leaves to the base.
        known: names of adapters with data.
        without: rows that are protected by the router's samples; none: all is trained.
        command: to be named in the router's card.

    Raises:
        DataError: the router keeps no samples of one of ``without``.
    """
    served = copy.deepcopy(model.router)
    assert isinstance(served, Router)
    hold = Sketches(without, len(known), served) if without else None
    if hold is not None and (bare := hold.lacking(served)):
        name = bare[0].partition("/")[2]
        raise DataError(
            f"{settings.data} has no text of {name}, and the router keeps no samples of it: it would be forgotten. "
            f"Add {name}.train.jsonl and {name}.validation.jsonl."
        )
    fit_untaught(model, known, settings.data)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(Path(scratch) / "fitted")
        training = RouterTrainSettings(
            model=Path(scratch) / "fitted", out=Path(scratch) / "trained", data=settings.data, start="saved",
            mixed=settings.mixed, documents=settings.documents, in_a_turn=settings.in_a_turn, asides=settings.asides,
            epochs=settings.epochs, learning_rate=settings.learning_rate or (ROWS_RATE if hold else RATE),
            batch_tokens=settings.batch_tokens, max_length=settings.max_length, seed=settings.seed,
            dtype=settings.dtype, null_start=learnt_null_start(settings.model),
        )  # fmt: skip
        metrics = router.train(training, resume=False, command=command, hold=hold)
        shutil.rmtree(training.work, ignore_errors=True)
        new = load(training.out).router
    assert isinstance(new, Router)
    return new, metrics


def with_text(model: MoLoRAModel, data: Path) -> tuple[list[str], list[str]]:
    """Names of the adapters that "auto" may choose and that have data, and rows of those that have none and can be
    found now.

    Raises:
        DataError: none has data.
    """
    served: Any = model.router
    # A layer that is off unless it is named is a choice of the person.
    layers = [layer for layer in model.stack.layers if layer.default == AUTO and layer.routed]
    names = [(layer.name, name) for layer in layers for name in layer.adapters]
    known = [name for _, name in names if (data / f"{name}.train.jsonl").is_file()]
    if not known:
        raise DataError(f"{data} holds no <adapter>.train.jsonl for any of {', '.join(name for _, name in names)}.")
    rows = [f"{layer}/{name}" for layer, name in names if name not in known]
    return known, [row for row in rows if _taught(served, row)]


def _taught(served: Any, row: str) -> bool:
    return float(served.parts[0].output.bias.detach()[served.rows.index(row)]) > NEVER / 2


def fit_untaught(model: MoLoRAModel, names: Sequence[str], data: Path) -> None:
    """Rows that "auto" cannot choose yet begin where a few examples put them."""
    for layer in model.stack.layers:
        for name in [name for name in names if name in layer.adapters]:
            if not _taught(model.router, f"{layer.name}/{name}"):
                examples = read_examples(data / f"{name}.train.jsonl")[:FITTED]
                texts = [render(model.tokenizer, list(one.messages), add_generation_prompt=False) for one in examples]
                model.fit_row(layer.name, name, texts)


def _against(
    settings: RouterUpdateSettings,
    right: Mapping[str, tuple[float, float]],
    of_samples: Mapping[str, tuple[float, float]],
    mixed: tuple[float, float],
) -> str:
    """Why the new version may not serve; nothing if it may."""
    judged = dict(right)
    if of_samples:  # each has so few that one sample is more than what may be lost: all together
        means = [statistics.mean(one[at] for one in of_samples.values()) for at in (0, 1)]
        judged["what has no text here (samples)"] = means[0], means[1]
    for name, (before, after) in judged.items():
        if before - after > settings.max_forgetting:
            most = settings.max_forgetting
            return f"{before - after:.1%} of the tokens of {name} are found no more, which may be {most:.1%} at most"
    gained = sum(after - before for before, after in right.values())
    return "" if gained > 0 or mixed[1] > mixed[0] else "nothing was gained"
