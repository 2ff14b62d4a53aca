"""What federated training keeps of central training's gain, by way, and at what price.

Rounds and clients are those of :mod:`molora_training.federated`, without Flower between them. A score is the loss on
each client's test conversations, in nats a token. Runs are kept as they are finished: an interrupted study goes on, and
several processes may share it.
"""

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from molora.errors import ConfigError, DataError
from molora_training.attention import attend_causally
from molora_training.batches import rounded
from molora_training.continual.update import as_examples, read_chats
from molora_training.data import Encoded, encode_within
from molora_training.federated import local
from molora_training.federated.client import Base, Client
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import (
    Aggregate,
    FederateSettings,
    LimitSettings,
    LocalSettings,
    PrivacySettings,
)
from molora_training.parts import finished
from molora_training.report import heading, line, write_report

BASE, CENTRAL, ALONE, FORWARD = "base", "central", "alone", "forward only"
FLEX, FLEX_EQUAL, NAIVE = "flexlora", "flexlora, equal ranks", "factors"
OPEN: dict[str, tuple[Aggregate, bool]] = {  # and whether the ranks differ
    FLEX: ("flexlora", True), FLEX_EQUAL: ("flexlora", False),
    "changes": ("changes", True), "changes, equal ranks": ("changes", False),
    "stack": ("stack", True), NAIVE: ("factors", True), "factors, equal ranks": ("factors", False),
    "shared": ("shared", True), "shared, equal ranks": ("shared", False),
}  # fmt: skip
PRIVATE = {"private, epsilon 8": 8.0, "private, epsilon 1": 1.0}
NAMES = (CENTRAL, ALONE, *OPEN, FORWARD, *PRIVATE)
RESAMPLES = 2000


@dataclass(frozen=True)
class StudySettings:
    """A study.

    Args:
        clients: names of prepared data, three or more.
        data: of all of them, train and test.
        seeds: how many runs of each way.
        rounds, ranks, local: as of a federated training; with equal ranks all have the largest.
        forward_rate: the learning rate without backpropagation.
        tests: conversations of each client to score by.
        clip, cohorts: of the private ways.
    """

    clients: tuple[str, ...]
    data: Path
    base: str
    seeds: int = 3
    rounds: int = 20
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    local: LocalSettings = field(default_factory=lambda: LocalSettings(examples=32, batch_tokens=2048, max_length=512))
    forward_rate: float = 1e-4
    tests: int = 24
    clip: float = 1.0
    cohorts: int = 4

    def __post_init__(self) -> None:
        if len(set(self.clients)) < max(3, len(self.clients)):
            raise ConfigError(f"A federation takes three clients or more, each once, not {', '.join(self.clients)}.")
        if min(self.seeds, self.rounds, self.tests) < 1:
            raise ConfigError("seeds, rounds and tests must be positive.")


def run(settings: StudySettings, out: Path, command: str, share: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Runs what is not there yet and writes ``out`` once all is.

    Returns:
        The report, or None while runs are missing.

    Raises:
        DataError: a client has no data. ConfigError: the accountant of the private ways is not installed.
    """
    parties = _Parties(settings)
    every = [(BASE, 0), *((name, seed) for seed in range(settings.seeds) for name in NAMES)]

    def make(index: int) -> dict[str, Any]:
        name, seed = every[index]
        found = _run(settings, parties, name, seed)
        print(f"{name}, seed {seed}: {statistics.mean(found['losses']):.4f} in {found['seconds']:.0f} s", flush=True)
        return found

    names = [f"{name.replace(', ', '-').replace(' ', '-')}-{seed}" for name, seed in every]
    kept = finished(out.parent / f".{out.stem}", names, parties.mark, share, make)
    if kept is None:
        return None
    report = _report(settings, dict(zip(every, kept, strict=True)), command)
    write_report(report, out)
    return report


@dataclass
class _Parties:
    """The clients with their text. Base and text are read when they are first needed."""

    settings: StudySettings

    @cached_property
    def base(self) -> Base:
        base = Base.load(self.settings.base)
        attend_causally(base.model, rounded(self.settings.local.max_length))
        return base

    @cached_property
    def files(self) -> dict[str, tuple[Path, Path]]:
        data = self.settings.data
        found = {name: (data / f"{name}.train.jsonl", data / f"{name}.test.jsonl") for name in self.settings.clients}
        for name, files in found.items():
            if not all(file.is_file() for file in files):
                raise DataError(f"{data} has no training and test data of {name}: run `molora train data many`.")
        return found

    @cached_property
    def mark(self) -> str:
        """Changes with what a run depends on."""
        record = {key: str(value) for key, value in asdict(replace(self.settings, seeds=1)).items() if key != "data"}
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for files in self.files.values():
            for file in files:
                digest.update(file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def clients(self) -> dict[str, Client]:
        return {name: Client.of_file(name, self.base, train) for name, (train, _) in self.files.items()}

    @cached_property
    def everyone(self) -> Client:
        """One client with the text of all."""
        return Client("everyone", self.base, [row for client in self.clients.values() for row in client.rows])

    @cached_property
    def tests(self) -> dict[str, list[Encoded]]:
        found = {}
        for name, (_, test) in self.files.items():
            rows = as_examples(read_chats(test), name)
            found[name] = encode_within(rows, self.base.tokenizer, self.settings.local.max_length, [name])
            found[name] = found[name][: self.settings.tests]
            if not found[name]:
                raise DataError(f"{test} has no conversation of up to {self.settings.local.max_length} tokens.")
        return found

    def losses(self, lora: Any, below: Any = None) -> list[float]:
        """Nats a token of each client's tests."""
        told = [local.loss(self.base.model, self.base.pad_id, lora, rows, below) for rows in self.tests.values()]
        return [total / count for total, count in told]


def _run(settings: StudySettings, parties: _Parties, name: str, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    if name == BASE:
        found: dict[str, Any] = {"losses": parties.losses(None)}
    elif name == ALONE:
        found = _alone(settings, parties, seed)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            how = _settings(settings, name, seed, Path(scratch))
            found = _federated(settings, parties, name, how)
    return {**found, "seconds": time.monotonic() - began}


def _settings(settings: StudySettings, name: str, seed: int, out: Path) -> FederateSettings:
    top = max(settings.ranks)
    aggregate, mixed = OPEN.get(name, ("shared" if name in PRIVATE else "changes", False))
    how = settings.local
    if name == CENTRAL:
        how = replace(how, examples=how.examples * len(settings.clients))
    if name == FORWARD:
        how = replace(how, method="forward", learning_rate=settings.forward_rate)
    privacy = PrivacySettings()
    if name in PRIVATE:
        privacy = PrivacySettings(epsilon=PRIVATE[name], clip=settings.clip, cohorts=settings.cohorts)
    return FederateSettings(
        out=out / "adapter", base=settings.base, ranks=settings.ranks if mixed else (top,), rounds=settings.rounds,
        aggregate=aggregate, local=how, limits=LimitSettings(fewest=1), privacy=privacy, seed=seed,
    )  # fmt: skip


def _federated(settings: StudySettings, parties: _Parties, name: str, how: FederateSettings) -> dict[str, Any]:
    """All rounds; without backpropagation as many as fit into the time that those with it take."""
    clients = {"everyone": parties.everyone} if name == CENTRAL else parties.clients
    limit = float("inf")
    if name == FORWARD:
        with tempfile.TemporaryDirectory() as scratch:
            trial = replace(how, out=Path(scratch) / "adapter", local=settings.local)
            limit = how.rounds * _round(Federation.open(trial), clients)
        how = replace(how, rounds=how.rounds * 1000)
    federation, spent, count = Federation.open(how), 0.0, 0
    while not federation.over and spent < limit:
        spent += _round(federation, clients)
        count += 1
    rows = [row for report in federation.reports for row in report.clients.values()]
    return {
        "losses": parties.losses(federation.lora, federation.below),
        "rounds": count,
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "bytes_up": statistics.mean(row["bytes_up"] for row in rows),
        "bytes_down": statistics.mean(row["bytes_down"] for row in rows),
        "refused": sum(len(report.refused) for report in federation.reports),
        "privacy": federation.private.report() if federation.private is not None else None,
    }


def _round(federation: Federation, clients: Mapping[str, Client]) -> float:
    """Seconds that one round took."""
    began = time.monotonic()
    ranks = federation.settings.ranks
    rank = {name: ranks[number % len(ranks)] for number, name in enumerate(clients)}
    turn = federation.cohort(list(clients))
    federation.close({name: clients[name].train(federation.order(name, rank[name])).to_bytes() for name in turn})
    return time.monotonic() - began


def _alone(settings: StudySettings, parties: _Parties, seed: int) -> dict[str, Any]:
    """Each client by itself, at its rank, scored on its own tests."""
    found = []
    for number, (name, client) in enumerate(parties.clients.items()):
        with tempfile.TemporaryDirectory() as scratch:
            how = _settings(settings, FLEX, seed, Path(scratch))
            own = Federation.open(replace(how, ranks=(how.ranks[number % len(how.ranks)],), aggregate="changes"))
            while not own.over:
                _round(own, {name: client})
            found.append(parties.losses(own.lora)[number])
    return {"losses": found}


def _report(settings: StudySettings, found: Mapping[tuple[str, int], Any], command: str) -> dict[str, Any]:
    base = torch.tensor(found[BASE, 0]["losses"], dtype=torch.float64)  # [clients]
    gains = {  # [seeds, clients] nats a token below the base's
        name: torch.stack(
            [base - torch.tensor(found[name, s]["losses"], dtype=torch.float64) for s in range(settings.seeds)]
        )
        for name in NAMES
    }
    rows: list[dict[str, Any]] = [{"way": BASE, "loss": float(base.mean())}]
    central = float(gains[CENTRAL].mean())
    for name in NAMES:
        own = [found[name, seed] for seed in range(settings.seeds)]
        low, high = _interval(gains[name])
        row: dict[str, Any] = {
            "way": name,
            "loss": float(base.mean() - gains[name].mean()),
            "gain": float(gains[name].mean()),
            "gain_interval": [low, high],
            "gain_of_central": float(gains[name].mean()) / central if central else 0.0,
            "seconds": statistics.mean(one["seconds"] for one in own),
        }
        for what in ("rounds", "peak_bytes", "bytes_up", "bytes_down", "refused"):
            if what in own[0]:
                row[what] = statistics.mean(one[what] for one in own)
        if own[0].get("privacy"):
            row["privacy"] = own[0]["privacy"]
        rows.append(row)
    by = {row["way"]: row for row in rows}
    ways = f"{len(settings.clients)} clients ({', '.join(settings.clients)}), {settings.seeds} seeds"
    cost = 100 * (by[FLEX_EQUAL]["gain_of_central"] - by[FLEX]["gain_of_central"])
    apart = by[FLEX]["gain_interval"][0] - by[NAIVE]["gain_interval"][1]
    memory = by[FORWARD]["peak_bytes"] / by[FLEX_EQUAL]["peak_bytes"]
    where = "of a GPU, base and all" if torch.cuda.is_available() else "resident, with all that the process ever kept"
    spread = f"ranks {', '.join(map(str, settings.ranks))}"
    return {
        **heading(command, f"{ways}; splits by sha256 of the document id"),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("data", "base")},
        "rows": rows,
        "must": [
            line("share of central training's gain, FlexLoRA", by[FLEX]["gain_of_central"], 0.95, "higher", spread),
            line("between the intervals of FlexLoRA and the naive form, nats", apart, 0.0, "higher", spread),
            line("what differing ranks cost, points of central's gain", cost, 1.0, "lower", spread),
            line("peak memory without backpropagation, over that with it", memory, 0.25, "lower", where),
        ],
    }


def _interval(gains: torch.Tensor) -> tuple[float, float]:
    """95% interval of the mean of gains [seeds, clients], clients drawn anew, the seeds' mean of each."""
    means = gains.mean(0)
    generator = torch.Generator().manual_seed(0)
    drawn = means[torch.randint(len(means), (RESAMPLES, len(means)), generator=generator)].mean(1).sort().values
    return float(drawn[int(0.025 * RESAMPLES)]), float(drawn[int(0.975 * RESAMPLES)])
