"""The server of a federated training: its orders, what it makes of the answers, and its state on disk.

It knows nothing of how messages travel: Flower brings them (:mod:`molora_training.federated.flower`), or a loop does.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from molora.adapter import CONFIG_FILE
from molora.atomic import new_folder, remove_folder, sweep, write_text
from molora.errors import FederationError, UpdateError
from molora.saved import load as load_saved
from molora_training.checkpoint import save_tensors
from molora_training.continual.edits import check_samples
from molora_training.continual.growth import blank
from molora_training.federated import row
from molora_training.federated.aggregate import DeltaSum, mean_of_factors, shares
from molora_training.federated.changes import b_sum, beside, from_vector
from molora_training.federated.client import Order, clipped
from molora_training.federated.guard import Asked, Guard, Update
from molora_training.federated.lora import Lora, distance, factor_distance, read_bytes
from molora_training.federated.place import Begun, state_folder
from molora_training.federated.private import Private
from molora_training.federated.settings import SCALE, FederateSettings
from molora_training.federated.usage import believed

BEFORE, BLANK = "before.json", "blank"
TRIES = 3  # of a round that too few answer


@dataclass
class RoundReport:
    """A round that is over.

    clients: of those that were taken what they said and cost: examples and norm of the change (of deltas, or of
        factors where those are added up), but with privacy, which does not cover them; bytes, seconds, memory.
    refused, absent: why. seconds: of the whole round. noise: of a tree's node, see :class:`Private`.
    """

    round: int
    clients: dict[str, dict[str, Any]]
    refused: dict[str, str]
    absent: list[str]
    norm: float
    seconds: float = 0.0
    noise: float | None = None


@dataclass
class Federation:
    """A training between two rounds.

    Args:
        settings: of the training.
        folder: where its state lies, a folder for the last round.
        config: of the adapter, as PEFT writes it.
        lora: the adapter, of the server's rank. below: what is finished and acts beneath (`stack` alone).
        reader: what clients read their text by, if the router is to get a row. moments: of it, summed over rounds.
        reports: of the rounds that are over.
        run: the training's name.
    """

    settings: FederateSettings
    folder: Path
    config: dict[str, Any]
    lora: Lora
    guard: Guard
    below: Lora | None = None
    private: Private | None = None
    reader: bytes = b""
    moments: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    reports: list[RoundReport] = field(default_factory=list)
    asked: dict[str, Asked] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    run: str = ""

    @classmethod
    def open(cls, settings: FederateSettings, resume: bool = True) -> "Federation":
        """Goes on from the last round that was finished, or begins.

        Raises:
            FederationError: what is on disk is another training's.
            AdapterError: the adapter to go on from cannot be read or has ranks that differ by module.
            VersionError: the router keeps no samples to fit a row against.
        """
        folder = state_folder(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        rounds = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
        if rounds and not resume:
            for number in rounds:
                remove_folder(folder / str(number))
            rounds = []
        measure = factor_distance if settings.aggregate in ("factors", "shared") else distance
        guard = Guard(settings.local.examples, settings.limits.max_norm, measure=measure)
        reader, moments = b"", torch.zeros(0)
        if settings.router is not None:
            router = check_samples(load_saved(settings.router).router)
            reader, moments = row.reader_of(router), torch.zeros(row.shape_of(router))
        if rounds:
            own = cls._read(settings, folder, rounds[-1], guard, reader)
        else:
            config, lora = _begun(settings, folder)
            own = cls(settings, folder, config, lora, guard, reader=reader, moments=moments)
            if settings.privacy.epsilon is not None:
                own.private = Private.begin(settings.privacy, settings.rounds, lora)
        known = Begun.read(settings.out) if rounds else None
        own.run = (known or Begun.write(settings)).run
        return own

    @property
    def round(self) -> int:
        """How many are over."""
        return len(self.reports)

    @property
    def blank(self) -> Path:
        """What it began with, if it did not go on from an adapter."""
        return self.folder / BLANK

    @property
    def over(self) -> bool:
        return self.round >= self.settings.rounds

    def begun_with(self, measure: Callable[[], dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
        """What clients lost under the adapter that the first round began with: measured once, and kept."""
        file = self.folder / BEFORE
        if self.round == 0:
            write_text(file, json.dumps(measure(), indent=1) + "\n")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def cohort(self, clients: Sequence[str]) -> list[str]:
        """Those that learn in this round: all, or with privacy one part of them after the other."""
        return list(clients) if self.private is None else self.private.cohort(clients)

    def order(self, client: str, rank: int) -> Order:
        """What ``client`` is asked for in this round, at its rank, which is the server's at most."""
        rank = max(1, min(rank, self.settings.rank))
        sent = self.lora.slice(rank)
        nonce = secrets.token_hex(16)
        self.asked[client] = Asked(self.round + 1, nonce, sent, tuple(self.moments.shape) if self.reader else None)
        found = Order(sent.to_bytes({**self._about(nonce), "client": client}), self._below(), self.reader)
        self.down[client] = found.nbytes
        return found

    def trial(self) -> Order:
        """The whole adapter, for clients to tell their loss under it."""
        return Order(self.lora.to_bytes(self._about("")), self._below())

    def close(self, answers: Mapping[str, bytes], seconds: float = 0.0) -> RoundReport:
        """Ends the round with the answers that came, and keeps what comes of it on disk.

        Raises:
            FederationError: too few of them may be taken; nothing has changed, and the round may be tried again.
        """
        good: dict[str, Update] = {}
        refused: dict[str, str] = {}
        about: dict[str, dict[str, Any]] = {}
        for client, message in answers.items():
            if client not in self.asked:
                refused[client] = "it was not asked"
                continue
            try:
                good[client] = self.guard.read(message, self.asked[client])
                about[client] = read_bytes(message)[1]
            except UpdateError as error:
                refused[client] = str(error)
        # With privacy whose update is taken must not depend on others' updates; each is clipped instead.
        wild = self.guard.compare(good) if self.private is None else {}
        refused |= wild
        taken = {client: one for client, one in good.items() if client not in wild}
        self._enough(len(taken), refused)
        rows = {
            client: {
                "name": str(about[client].get("client", ""))[:64],
                "rank": one.factors.rank,
                **({"examples": one.examples, "norm": one.norm} if self.private is None else {}),
                "bytes_down": self.down[client],
                "bytes_up": len(answers[client]),
                **believed(about[client].get("usage")),
            }
            for client, one in taken.items()
        }
        before = self.result()
        self.guard.keep(taken.values())
        weights = shares({client: one.examples for client, one in taken.items()})
        if self.private is not None:
            # Nothing says that a client clipped what it sent.
            most = self.settings.privacy.clip
            updates = [clipped(self.lora, beside(one.factors, self.lora), most) for one in taken.values()]
            self.lora = self.private.step(b_sum(self.lora, updates), list(taken))
        else:
            self._aggregate([(one.factors, weights[client]) for client, one in taken.items()])
            for client, one in taken.items():
                if one.moments is not None:
                    self.moments = self.moments + weights[client] * one.moments
        return self._end(before, rows, refused, answers, seconds)

    def close_sum(self, mean: torch.Tensor, clients: Mapping[str, dict[str, Any]], seconds: float = 0.0) -> RoundReport:
        """Ends a round of which the server knows nothing but the mean of what its clients changed of B.

        Args:
            mean: float32 [entries of B and of a row's moments], each client weighing the same, in the order of
                :func:`~molora_training.federated.changes.b_vector`.
            clients: of those in it, by name, what they tell of its cost.
        """
        self._enough(len(clients), {})
        if not bool(torch.isfinite(mean).all()):
            raise FederationError("The sum of the updates is not finite: a client sent what cannot be added.")
        before = self.result()
        change = from_vector(mean[: len(mean) - self.moments.numel()], self.lora)
        if self.reader:
            told = row.from_vector(mean[-self.moments.numel() :], self.moments.shape, self.settings.privacy.clip)
            try:
                row.check_moments(told)
            except UpdateError as error:
                raise FederationError(f"The sum of the updates cannot be taken: {error}.") from None
            self.moments = self.moments + told
        if self.private is not None:
            self.lora = self.private.step({name: len(clients) * b for name, b in change.items()}, list(clients))
        else:
            self.lora = Lora({n: (a, b + change[n]) for n, (a, b) in self.lora.pairs.items()}, self.lora.scale)
        rows = {
            client: {"rank": self.asked[client].sent.rank, "bytes_down": self.down[client], **believed(told)}
            for client, told in clients.items()
        }
        return self._end(before, rows, {}, clients, seconds)

    def result(self) -> Lora:
        """The adapter as it stands: with `stack` all that was summed, and the factors that learn now."""
        if self.below is None:
            return self.lora
        total = DeltaSum()
        total.add(self.below, 1.0)
        total.add(self.lora, 1.0)
        return total.exact()

    def _about(self, nonce: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "round": self.round + 1,
            "nonce": nonce,
            "seed": settings.seed * 1_000_003 + self.round,
            "local": asdict(settings.local),
            "frozen_a": settings.aggregate == "shared",
            "clip": settings.privacy.clip if settings.privacy.sums_only else None,
            "rank": settings.rank,
        }

    def _below(self) -> bytes:
        return b"" if self.below is None else self.below.to_bytes({})

    def _enough(self, count: int, refused: Mapping[str, str]) -> None:
        if count < self.settings.limits.fewest:
            why = "".join(f" {client} was refused: {reason}." for client, reason in refused.items())
            raise FederationError(
                f"Round {self.round + 1} has {count} updates that may be taken, and limits.fewest asks for "
                f"{self.settings.limits.fewest}.{why}"
            )

    def _aggregate(self, updates: Sequence[tuple[Lora, float]]) -> None:
        how, rank, scale, seed = self.settings.aggregate, self.settings.rank, self.lora.scale, self._about("")["seed"]
        if how == "factors":
            mean = mean_of_factors(updates)
            self.lora = beside(mean, self.lora)
        elif how == "shared":
            pairs = {}
            for name, (a, b) in self.lora.pairs.items():
                new = b.clone()
                for one, weight in updates:
                    own = one.pairs[name][1]
                    new[:, : own.shape[1]] += weight * (own - b[:, : own.shape[1]])
                pairs[name] = (a, new)
            self.lora = Lora(pairs, scale)
        else:
            total = DeltaSum()
            if how == "changes":
                total.add(self.lora, 1.0)
            elif self.below is not None:
                total.add(self.below, 1.0)
            for one, weight in updates:
                total.add(one, weight)
                if how == "changes":
                    total.add(self.lora.slice(one.rank), -weight)
            if how == "stack":
                self.below, self.lora = total.exact(), _fresh(self.lora, seed)
            else:
                self.lora = total.cut(rank, scale, seed)

    def _end(
        self, before: Lora, rows: dict[str, dict[str, Any]], refused: dict[str, str], answered: Mapping[str, Any],
        seconds: float,
    ) -> RoundReport:  # fmt: skip
        norm = distance(self.result(), before)
        absent = sorted(set(self.asked) - set(answered))
        noise = self.private.noise if self.private is not None else None
        report = RoundReport(self.round + 1, rows, refused, absent, norm, round(seconds, 2), noise)
        self.reports.append(report)
        self.asked.clear()
        self.down.clear()
        self._write()
        return report

    def _write(self) -> None:
        tensors = {f"lora.{name}": tensor for name, tensor in self.lora.tensors().items()}
        if self.below is not None:
            tensors |= {f"below.{name}": tensor for name, tensor in self.below.tensors().items()}
        if self.private is not None:
            tensors |= {f"private.{name}": tensor for name, tensor in self.private.tensors().items()}
        if self.reader:
            tensors["moments"] = self.moments
        state = {
            "mark": mark(self.settings, self.reader),
            "scale": self.lora.scale,
            "config": self.config,
            "seen": sorted(self.guard.seen),
            "reports": [asdict(report) for report in self.reports],
            "private": self.private.state() if self.private is not None else None,
        }
        with new_folder(self.folder / str(self.round)) as folder:
            save_tensors(folder / "tensors.safetensors", tensors)
            (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in self.folder.glob("*"):
            if path.name.isdecimal() and int(path.name) < self.round:
                remove_folder(path)

    @classmethod
    def _read(cls, settings: FederateSettings, folder: Path, number: int, guard: Guard, reader: bytes) -> "Federation":
        place = folder / str(number)
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        if state["mark"] != mark(settings, reader):
            raise FederationError(
                f"{folder} holds round {number} of a training with other settings: take those again, another `out`, or "
                f"--no-resume to begin anew."
            )
        tensors = load_file(place / "tensors.safetensors")

        def part(start: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}

        guard.seen = set(state["seen"])
        below = part("below.")
        return cls(
            settings,
            folder,
            state["config"],
            Lora.from_tensors(part("lora."), state["scale"]),
            guard,
            Lora.from_tensors(below, 1.0) if below else None,
            Private.read(settings.privacy, state["private"], part("private.")) if state["private"] else None,
            reader,
            tensors.get("moments", torch.zeros(0)),
            [RoundReport(**report) for report in state["reports"]],
        )


def mark(settings: FederateSettings, reader: bytes) -> str:
    """Changes with what a round depends on; the number of rounds, time limits and places may change on the way."""
    same = replace(settings, rounds=1, out=Path(), data=Path(), limits=replace(settings.limits, seconds=1.0))
    if settings.privacy.epsilon is not None:  # the noise is chosen for all rounds together
        same = replace(same, rounds=settings.rounds)
    told = json.dumps(asdict(same), default=str, sort_keys=True).encode()
    return hashlib.sha256(told + hashlib.sha256(reader).digest()).hexdigest()


def _begun(settings: FederateSettings, folder: Path) -> tuple[dict[str, Any], Lora]:
    """The adapter to begin with, of the server's rank, and its config."""
    place = settings.start
    if place is None:
        place = folder / BLANK
        if place.is_dir():  # of a training that finished no round, or that is begun anew: its settings may be others
            remove_folder(place)
        blank(settings.base, settings.rank, place, settings.seed)
    lora = Lora.from_folder(place)
    config = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = settings.base
    if settings.start is None:
        return config, Lora(lora.pairs, SCALE)
    if lora.rank > settings.rank:
        raise FederationError(
            f"The adapter at {place} has rank {lora.rank}, and the largest of `ranks` is {settings.rank}: some client "
            f"must have that rank at least."
        )
    total = DeltaSum()
    total.add(lora, 1.0)
    return config, total.cut(settings.rank, lora.scale, settings.seed)


def _fresh(like: Lora, seed: int) -> Lora:
    """Factors that do nothing yet: A drawn anew, B zeros."""
    empty = DeltaSum({n: (a.double()[:1] * 0, b.double()[:, :1] * 0) for n, (a, b) in like.pairs.items()})
    return empty.cut(like.rank, like.scale, seed)
