"""What becomes of a router while adapters come and go, by how it learns of those that come.

It begins with some adapters; others arrive one by one, and now and then one leaves. It reads embeddings, so the
adapters' weights do not matter, and adapters that do nothing stand in for all of them. Beside the ways of learning
stand what learns nothing of the past (the new text alone) and what is trained anew on all text.
"""

import hashlib
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from molora import MoLoRAModel, Router, RouterConfig, Stack, StackLayer
from molora.base import DEFAULT_BASE
from molora.errors import ConfigError, DataError
from molora_training import router
from molora_training.continual.growth import blank
from molora_training.continual.probe import Probe
from molora_training.continual.router_update import RouterUpdateSettings, fit_untaught, go_on
from molora_training.data import read_examples, write_examples
from molora_training.parts import finished
from molora_training.report import heading, write_report
from molora_training.router_settings import RouterTrainSettings

LAYER = "domain"
ANEW, ALONE, EXAMPLES, SKETCHES, REPLAY = "trained anew", "new text alone", "examples", "sketches", "replay"
WAYS = (ANEW, ALONE, EXAMPLES, SKETCHES, REPLAY)
FITTED = 128  # examples of a row that is fitted
REPLAYED = 64  # of each other adapter
SINGLE, MIXED = 24, 80  # test conversations of each adapter, and of several
BETWEEN = 3  # arrivals before one leaves
SHORT = (300, 200, 200, 100)  # conversations, documents, double questions and asides of a short training


@dataclass(frozen=True)
class ArrivalSettings:
    """A study.

    Args:
        names: of prepared data, one an adapter, in the order in which they come.
        data: where it lies.
        first: how many are there from the beginning.
        seeds: of the trainings and of who leaves.
        mixed, documents, in_a_turn, asides: texts of several domains that a router is trained on anew with.
    """

    names: tuple[str, ...]
    data: Path
    base: str = DEFAULT_BASE
    first: int = 8
    seeds: int = 1
    mixed: int = 800
    documents: int = 500
    in_a_turn: int = 500
    asides: int = 300
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if not 2 <= self.first < len(self.names) or len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"Two adapters or more are there first, and others come, each once: not {self.first} of "
                f"{len(self.names)} names."
            )


def events(settings: ArrivalSettings, seed: int) -> list[tuple[str, str]]:
    """("comes" or "leaves", name): after every third arrival one leaves, any that is there but the last to come."""
    chance = random.Random(seed)
    there, found = list(settings.names[: settings.first]), []
    for number, name in enumerate(settings.names[settings.first :], 1):
        found.append(("comes", name))
        if number % BETWEEN == 0:
            gone = chance.choice(there)
            there.remove(gone)
            found.append(("leaves", gone))
        there.append(name)
    return found


def run(settings: ArrivalSettings, out: Path, command: str, share: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Runs what is not there yet and writes ``out`` once all is; arguments and errors as of
    :func:`molora_training.continual.study.run`."""
    for name in settings.names:
        for split in ("train", "validation", "test"):
            if not (settings.data / f"{name}.{split}.jsonl").is_file():
                raise DataError(f"{settings.data} has no {name}.{split}.jsonl: `molora train data` makes data.")
    every = [(way, seed) for seed in range(settings.seeds) for way in WAYS]
    work = out.parent / f".{out.stem}"

    def make(index: int) -> dict[str, Any]:
        way, seed = every[index]
        found = _sequence(settings, way, seed, work)
        print(f"{way}, seed {seed}: {found['points'][-1]} in {found['seconds']:.0f} s", flush=True)
        return found

    names = [f"{way.replace(' ', '-')}-{seed}" for way, seed in every]
    record = {k: str(v) for k, v in asdict(replace(settings, seeds=1)).items() if k != "data"}
    kept = finished(work, names, hashlib.sha256(json.dumps(record).encode()).hexdigest(), share, make)
    if kept is None:
        return None
    report = _report(settings, list(zip(every, kept, strict=True)), command)
    write_report(report, out)
    return report


def _sequence(settings: ArrivalSettings, way: str, seed: int, work: Path) -> dict[str, Any]:
    began = time.monotonic()
    model = MoLoRAModel.from_pretrained(_beginning(settings, seed, work), dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    points = [_point(settings, model)]
    seconds: list[float] = []
    for kind, name in events(settings, seed):
        if kind == "leaves":
            model.remove_adapter(LAYER, name)
            with tempfile.TemporaryDirectory() as scratch:
                if way == ANEW:
                    started = time.monotonic()
                    model.set_router(_trained(settings, list(model.stack[LAYER].adapters), seed, Path(scratch)))
                    seconds.append(time.monotonic() - started)
            points.append(_point(settings, model))
            continue
        started = time.monotonic()
        model.add_adapter(LAYER, name, work / "blank")
        if way != ANEW:
            _learn(settings, model, way, name, seed)
            seconds.append(time.monotonic() - started)
    router_: Any = model.router
    samples = sum(part.samples.features.nbytes + part.samples.rows.nbytes for part in router_.parts)
    there = list(model.stack[LAYER].adapters)
    text = {ANEW: None, REPLAY: REPLAYED}.get(way, 0)
    return {
        "there": there, "points": points, "update_seconds": statistics.median(seconds),
        "text_bytes": sum(_size(settings, name, text) for name in there),
        "sample_bytes": 0 if way in (ANEW, ALONE, REPLAY) else samples,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _learn(settings: ArrivalSettings, model: MoLoRAModel, way: str, name: str, seed: int) -> None:
    """What an arrival does to the router."""
    others = [one for one in model.stack[LAYER].adapters if one != name]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        for one in [name, *others] if way == REPLAY else [name]:
            for split in ("train", "validation"):
                rows = read_examples(settings.data / f"{one}.{split}.jsonl")
                few = REPLAYED if one != name else FITTED if way == EXAMPLES else None
                write_examples(data / f"{one}.{split}.jsonl", rows[:few])
        how = RouterUpdateSettings(
            data, data, seed=seed, batch_tokens=settings.batch_tokens, mixed=SHORT[0], documents=SHORT[1],
            in_a_turn=SHORT[2], asides=SHORT[3],
        )  # fmt: skip
        without = [f"{LAYER}/{one}" for one in others] if way == SKETCHES else []
        if way == EXAMPLES:
            fit_untaught(model, [name], data)
            return
        new, _ = go_on(model, how, [name, *others] if way == REPLAY else [name], without)
    model.set_router(new)


def _beginning(settings: ArrivalSettings, seed: int, work: Path) -> Path:
    """The saved MoLoRA that all ways begin with, made by the first process that needs it."""
    place = work / f"first-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / ".first.lock"):
        if not (work / "blank").is_dir():
            blank(settings.base, 1, work / "blank")
        mark, record = place / "settings.json", json.dumps(asdict(settings) | {"seeds": 1}, default=str)
        if not mark.is_file() or mark.read_text(encoding="utf-8") != record:
            shutil.rmtree(place, ignore_errors=True)
            names = list(settings.names[: settings.first])
            with tempfile.TemporaryDirectory() as scratch:
                found = _trained(settings, names, seed, Path(scratch))
            model = MoLoRAModel.from_base(settings.base, _stack(names, work / "blank"), dtype=torch.float32)
            model.set_router(found)
            model.save_pretrained(place)
            mark.write_text(record, encoding="utf-8")
    return place


def _stack(names: Sequence[str], adapter: Path) -> Stack:
    return Stack([StackLayer(LAYER, {name: str(adapter.resolve()) for name in names}, default="auto")])


def _trained(settings: ArrivalSettings, names: Sequence[str], seed: int, scratch: Path) -> Router:
    """A new router for these adapters."""
    blank(settings.base, 1, scratch / "blank")
    _stack(names, scratch / "blank").save(scratch / "stack.yaml")
    how = RouterTrainSettings(
        model=scratch / "stack.yaml", out=scratch / "trained", data=settings.data, base=settings.base,
        router=RouterConfig(), mixed=settings.mixed, documents=settings.documents, in_a_turn=settings.in_a_turn,
        asides=settings.asides, epochs=1, batch_tokens=settings.batch_tokens, seed=seed, dtype="float32",
    )  # fmt: skip
    router.train(how, resume=False)
    shutil.rmtree(how.work, ignore_errors=True)
    found = MoLoRAModel.from_pretrained(how.out, dtype=torch.float32).router
    assert isinstance(found, Router)
    return found


def _point(settings: ArrivalSettings, model: MoLoRAModel) -> dict[str, float]:
    """Shares of the test text's tokens that go to their own adapter: of those from the beginning that are still there
    and of those that came, the means over adapters, and of text that changes its domain."""
    names = list(model.stack[LAYER].adapters)
    probe = Probe(
        model.tokenizer, settings.data, names, single=SINGLE, mixed=MIXED, max_length=1024, split="test",
        batch_tokens=settings.batch_tokens,
    )  # fmt: skip
    choices = probe.choices(model)
    right = {name: probe.right(choices, name) for name in names}
    first = [right[name] for name in names if name in settings.names[: settings.first]]
    came = [right[name] for name in names if name not in settings.names[: settings.first]]
    return {
        "first": statistics.mean(first), "came": statistics.mean(came) if came else 0.0,
        "mixed": probe.right(choices, None),
    }  # fmt: skip


def _size(settings: ArrivalSettings, name: str, most: int | None) -> int:
    """Bytes of training text of an adapter that a way has to keep: of so many examples (None: of all)."""
    with (settings.data / f"{name}.train.jsonl").open("rb") as lines:
        return sum(len(line) for number, line in enumerate(lines) if most is None or number < most)


def _report(settings: ArrivalSettings, kept: Sequence[tuple[tuple[str, int], Any]], command: str) -> dict[str, Any]:
    rows = []
    for way in WAYS:
        own = [found for (of, _), found in kept if of == way]
        row: dict[str, Any] = {"way": way}
        for what in ("update_seconds", "text_bytes", "sample_bytes"):
            row[what] = statistics.mean(one[what] for one in own)
        row["points"] = [
            {what: statistics.mean(one["points"][at][what] for one in own) for what in ("first", "came", "mixed")}
            for at in range(len(own[0]["points"]))
        ]
        rows.append(row)
    come = len(settings.names) - settings.first
    sets = f"{settings.first} adapters, {come} arrivals, {come // BETWEEN} departures, {settings.seeds} seeds"
    return {
        **heading(command, f"{sets}; test split by sha256 of the task or document id"),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("data", "base")},
        "rows": rows,
    }
