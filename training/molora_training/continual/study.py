"""What a sequence of tasks does to one adapter, by method: what it knows in the end, what it lost, and at what price.

Each task is a domain; the adapter goes from one to the next, and after each it is scored on all. A score is the share
of the answers' tokens, in percent, that it finds likeliest. Beside the methods stand what learns nothing from the past
(sequential fine-tuning) and what sees everything at once (joint training). Sequences are kept as they are finished: an
interrupted study goes on, and several processes may share it.
"""

import hashlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.adapter import Adapter
from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora_training.batches import plan_pass
from molora_training.continual.apart import Apart
from molora_training.continual.growth import blank
from molora_training.continual.measures import measures
from molora_training.continual.memory import BYTES, Memory
from molora_training.continual.methods import MethodName
from molora_training.continual.questions import represented
from molora_training.continual.separable import block_rank
from molora_training.continual.smolora import SMoLora
from molora_training.continual.update import UpdateSettings, as_examples, learn, made_up, write_chats
from molora_training.data import IGNORED, Batch, Split, collate, encode_within, read_examples
from molora_training.evaluate import seeing
from molora_training.parts import finished
from molora_training.report import heading, line, write_report

JOINT = "joint training"
INVENTED = "invented replay"  # of as many conversations as are new
METHOD: dict[str, tuple[MethodName, bool]] = {  # and whether earlier text is replayed
    "sequential": ("plain", False), "replay": ("plain", True), INVENTED: ("plain", False),
    "elastic": ("elastic", False), "orthogonal": ("orthogonal", False), "distil": ("distil", False),
    "elastic, replay": ("elastic", True), "orthogonal, replay": ("orthogonal", True),
    "distil, replay": ("distil", True),
    "inflora": ("inflora", False), "sd-lora": ("sd-lora", False), "treelora": ("treelora", False),
    "inflora, replay": ("inflora", True),
}  # fmt: skip
APART = {"apart, by router": True, "apart, by key": False}  # adapters of their own, and whether a router finds them
SMOLORA = "smolora"
NAMES = (*METHOD, *APART, SMOLORA)
DEFAULT = "replay"
SCORED = 4  # times as many tokens at once as in training, since nothing is kept of them
Row = Mapping[str, Any]


@dataclass(frozen=True)
class StudySettings:
    """A study.

    Args:
        tasks: domains, two or more.
        data: prepared data of all of them.
        orders, seeds: how many orders of the tasks, and seeds of each.
        examples, held_out, tests: of each task, to learn, to choose the step by, and to score.
        rank: of the adapter. memory: bytes of text that are kept of each task.
    """

    tasks: tuple[str, ...]
    data: Path
    base: str = DEFAULT_BASE
    orders: int = 3
    seeds: int = 3
    examples: int = 256
    held_out: int = 48
    tests: int = 100
    rank: int = 16
    memory: int = BYTES
    learning_rate: float = 5e-4
    epochs: int = 3
    max_length: int = 512
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"A sequence takes two tasks or more, each once, not {', '.join(self.tasks) or 'none'}.")
        if min(self.orders, self.seeds, self.examples, self.held_out, self.tests, self.memory) < 1:
            raise ConfigError("orders, seeds, examples, held_out, tests and memory must be positive.")
        block_rank(self.rank)


@dataclass(frozen=True)
class Run:
    """One sequence of tasks. method: a name of NAMES, or JOINT."""

    method: str
    order: int
    seed: int


def run(settings: StudySettings, out: Path, command: str, share: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Runs what is not there yet and writes ``out`` once all is.

    Args:
        settings: what is studied.
        out: the report; what is finished lies in a hidden folder beside it.
        command: to be named in it.
        share: (i, n): of n processes the i-th, which runs every n-th sequence.

    Returns:
        The report, or None while sequences are missing.

    Raises:
        DataError: a task has no data, or less than is asked for.
    """
    texts = {task: _texts(settings, task) for task in settings.tasks}
    every = list(sequences(settings))
    score = Scorer(settings, {task: texts[task]["test"] for task in settings.tasks})

    def make(index: int) -> dict[str, Any]:
        one = every[index]
        found = _joint(settings, one, texts, score) if one.method == JOINT else _sequence(settings, one, texts, score)
        average, seconds = found["average"], found["seconds"]
        print(f"{one.method}, order {one.order}, seed {one.seed}: {average:.2f} in {seconds} s", flush=True)
        return found

    kept = finished(out.parent / f".{out.stem}", part_names(settings), _mark(settings, texts), share, make)
    if kept is None:
        return None
    report = _report(settings, list(zip(every, kept, strict=True)), command)
    write_report(report, out)
    return report


def sequences(settings: StudySettings) -> Iterator[Run]:
    """Joint training knows no order."""
    for seed in range(settings.seeds):
        yield Run(JOINT, 0, seed)
    for seed, order, method in itertools.product(range(settings.seeds), range(settings.orders), NAMES):
        yield Run(method, order, seed)


def part_names(settings: StudySettings) -> list[str]:
    """Of the file in which each sequence is kept."""
    return [f"{one.method.replace(', ', '-').replace(' ', '-')}-{one.order}-{one.seed}" for one in sequences(settings)]


def order_of(settings: StudySettings, number: int) -> list[str]:
    """The tasks in one of their orders."""
    tasks = list(settings.tasks)
    random.Random(number).shuffle(tasks)
    return tasks


def _sequence(
    settings: StudySettings, one: Run, texts: Mapping[str, Mapping[str, list[Row]]], score: "Scorer"
) -> dict[str, Any]:
    started = time.monotonic()
    tasks = order_of(settings, one.order)
    with tempfile.TemporaryDirectory() as scratch:
        blank(settings.base, settings.rank, Path(scratch) / "blank", one.seed)
        learner = (_Held if one.method in METHOD else _Choosing)(settings, one, Path(scratch))
        before = score(Path(scratch) / "blank", tasks)
        after, seconds, peaks = [], [], []
        for task in tasks:
            began = time.monotonic()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            learner.learn(task, texts[task]["train"], texts[task]["validation"])
            seconds.append(time.monotonic() - began)
            peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
            after.append(score(learner.served, tasks))
        kept = learner.kept()
    return {
        "tasks": tasks, "before": before, "after": after, **asdict(measures(after, before)),
        "update_seconds": statistics.median(seconds), "peak_bytes": max(peaks), **kept,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


class _Held:
    """One adapter that goes from task to task, by a method of NAMES."""

    def __init__(self, settings: StudySettings, one: Run, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.method, self.replays = METHOD[one.method]
        self.served, self.state = folder / "blank", folder / f"{self.method}.safetensors"
        self.how = _how(settings, one, folder, self.method)
        self.invents = one.method == INVENTED
        self.memories: list[Memory] = []

    def learn(self, task: str, new: list[Row], apart: list[Row]) -> None:
        work = self.folder / task
        work.mkdir()
        remembered = [row for memory in self.memories for row in memory.rows] if self.replays else []
        how = replace(self.how, invent=len(new) if self.invents and self.memories else 0)
        again = [*_even(remembered, len(new)), *made_up(how, self.settings.base, self.served)]
        write_chats(work / "train.jsonl", [*new, *again], task)
        write_chats(work / "validation.jsonl", apart, task)
        way, self.served, _ = learn(how, self.settings.base, self.served, self.state, new, work)
        way.keep(self.served)
        self.memories.append(Memory(limit=self.settings.memory).with_(new))

    def kept(self) -> dict[str, int]:
        text = sum(len(json.dumps(row)) for memory in self.memories for row in memory.rows) if self.replays else 0
        state = self.state.stat().st_size if self.state.is_file() else 0
        return {"text_bytes": text, "state_bytes": state, "rank": Adapter.load(self.served).ranks[0]}


class _Choosing:
    """What chooses by the question what of it answers: adapters that are apart, or blocks of one."""

    def __init__(self, settings: StudySettings, one: Run, folder: Path) -> None:
        how = _how(settings, one, folder, "plain")
        self.served: Apart | SMoLora
        if one.method in APART:
            self.served = Apart(how, settings.base, folder, APART[one.method])
        else:
            self.served = SMoLora(how, settings.base, settings.rank)

    def learn(self, task: str, new: list[Row], apart: list[Row]) -> None:
        self.served.learn(task, new, apart)

    def kept(self) -> dict[str, int]:
        return {"text_bytes": 0, "state_bytes": self.served.bytes, "rank": self.served.rank}


def _how(settings: StudySettings, one: Run, folder: Path, method: MethodName) -> UpdateSettings:
    return UpdateSettings(
        folder, "", "adapter", folder, method=method, learning_rate=settings.learning_rate, epochs=settings.epochs,
        max_length=settings.max_length, batch_tokens=settings.batch_tokens, seed=one.seed,
    )  # fmt: skip


def _joint(
    settings: StudySettings, one: Run, texts: Mapping[str, Mapping[str, list[Row]]], score: "Scorer"
) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        blank(settings.base, settings.rank, folder / "blank", one.seed)
        for split in ("train", "validation"):
            rows = [row for task in settings.tasks for row in texts[task][split]]
            write_chats(folder / f"{split}.jsonl", rows, "all")
        how = _how(settings, one, folder, "plain")
        _, served, _ = learn(how, settings.base, folder / "blank", folder / "none", [], folder)
        scores = score(served, settings.tasks)
    return {
        "tasks": list(settings.tasks), "scores": scores, "average": statistics.mean(scores),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


class Scorer:
    """Percent of the answers' tokens of each task's test text that an adapter finds likeliest.

    Base and text are read once, at the first adapter.
    """

    def __init__(self, settings: StudySettings, tests: Mapping[str, Sequence[Row]]) -> None:
        self.settings, self.tests = settings, tests
        self.model: Any = None
        self.numbers = itertools.count()
        self.batches: dict[str, list[tuple[Batch, torch.Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, served: Path | Apart | SMoLora, tasks: Sequence[str]) -> list[float]:
        """Scores of an adapter's folder, or of what chooses by the question."""
        if isinstance(served, Path):
            self._take(served)
            return [self._score(lambda _: self.model, self.model.get_output_embeddings(), task) for task in tasks]
        return [self._score(served.answering, served.head, task) for task in tasks]

    def _take(self, folder: Path) -> None:
        from peft import PeftModel

        if self.model is not None:
            old, new = self.model.active_adapter, f"adapter{next(self.numbers)}"
            self.model.load_adapter(folder, new)
            self.model.set_adapter(new)
            self.model.delete_adapter(old)
            return
        how = UpdateSettings(folder, "", "adapter", folder)
        base, tokenizer = load_base(self.settings.base, dtype=getattr(torch, how.chosen_dtype))
        self.model = PeftModel.from_pretrained(base, folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        for task, rows in self.tests.items():
            encoded = encode_within(as_examples(rows, task), tokenizer, self.settings.max_length, [task])
            with self.model.disable_adapter():
                asked = represented(self.model, encoded, 0, self.settings.batch_tokens)
            self.batches[task] = [
                (collate([encoded[index] for index in indices], 0).to(self.model.device), asked[indices])
                for indices in plan_pass([len(row.input_ids) for row in encoded], SCORED * self.settings.batch_tokens)
            ]

    def _score(self, model_for: Callable[[torch.Tensor], Any], head: nn.Module, task: str) -> float:
        """model_for: what answers questions of these representations. head: its output head."""
        right = count = 0
        for batch, asked in self.batches[task]:
            wanted = batch.labels[:, 1:]
            answer = wanted != IGNORED
            with seeing(head, answer):
                said = model_for(asked)(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            right += int((said.argmax(-1) == wanted[answer]).sum())
            count += len(said)
        return 100 * right / max(1, count)


def _texts(settings: StudySettings, task: str) -> dict[str, list[Row]]:
    """Conversations of each split, as they are in the data."""
    wanted: dict[Split, int] = {"train": settings.examples, "validation": settings.held_out, "test": settings.tests}
    found: dict[str, list[Row]] = {}
    for split, count in wanted.items():
        rows = read_examples(settings.data / f"{task}.{split}.jsonl")[:count]
        if len(rows) < min(count, 8):
            raise DataError(f"{task} has {len(rows)} conversations to {split}; eight at least are needed.")
        found[split] = [{"messages": list(row.messages)} for row in rows]
    return found


def _even(rows: Sequence[Row], count: int) -> list[Row]:
    """``count`` of them, spread evenly over their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def _report(settings: StudySettings, found: Sequence[tuple[Run, Row]], command: str) -> dict[str, Any]:
    joint = [float(row["average"]) for one, row in found if one.method == JOINT]
    rows: list[dict[str, Any]] = [{"method": JOINT, "average": statistics.mean(joint), "averages": joint}]
    for name in NAMES:
        own = [row for one, row in found if one.method == name]
        row = {"method": name, "keeps_text": name in METHOD and METHOD[name][1]}
        for what in (
            "average",
            "forgetting",
            "backward",
            "forward",
            "update_seconds",
            "peak_bytes",
            "text_bytes",
            "state_bytes",
            "rank",
        ):
            row[what] = statistics.mean(float(one[what]) for one in own)
            row[f"{what}_range"] = [min(float(one[what]) for one in own), max(float(one[what]) for one in own)]
        row["curve"] = [
            statistics.mean(statistics.mean(one["after"][step][: step + 1]) for one in own)
            for step in range(len(settings.tasks))
        ]
        rows.append(row)
    default = next(row for row in rows if row["method"] == DEFAULT)
    strict = min((row for row in rows[1:] if not row["keeps_text"]), key=lambda row: -row["average"])
    names, best = ", ".join(settings.tasks), rows[0]["average"] or 1.0  # 0: nothing was learnt, and none is divided
    sets = f"{len(settings.tasks)} tasks ({names}), {settings.orders} orders, {settings.seeds} seeds"
    return {
        **heading(command, f"{sets}; splits by sha256 of the task or document id"),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("data", "base")},
        "rows": rows,
        "must": [
            line("forgetting of the default, points", default["forgetting"], 2.0, "lower", DEFAULT),
            line("average over that of joint training", default["average"] / best, 0.95, "higher", DEFAULT),
            line("the same without any text kept", strict["average"] / best, 0.95, "higher", strict["method"]),
            line("bytes of text kept a task", default["text_bytes"] / len(settings.tasks), BYTES, "lower", DEFAULT),
        ],
    }  # fmt: skip


def _mark(settings: StudySettings, texts: Mapping[str, Any]) -> str:
    record = {key: str(value) for key, value in asdict(replace(settings, orders=1, seeds=1)).items() if key != "data"}
    return hashlib.sha256(json.dumps([record, texts], sort_keys=True).encode()).hexdigest()
