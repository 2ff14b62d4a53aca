"""What comes of a federated training: a PEFT folder, or a version of a saved MoLoRA's adapter that passes its gate."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from molora.atomic import PARTIAL, remove_folder
from molora.errors import FederationError
from molora.saved import load
from molora.versions import Version, Versions
from molora_training.checkpoint import place_folder
from molora_training.continual.chance import by_chance
from molora_training.continual.edits import NewRow, check_samples, too_much_taken
from molora_training.continual.memory import Memory
from molora_training.continual.update import MEMORY, Change, Judge, UpdateSettings, read_chats, refusal
from molora_training.federated.place import Begun
from molora_training.federated.rounds import Federation
from molora_training.federated.row import with_row
from molora_training.federated.settings import FederateSettings

Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Into:
    """An adapter of a saved MoLoRA. general: conversations that have nothing to do with it."""

    model: Path
    layer: str
    name: str
    general: Path | None = None

    def served(self) -> Path | None:
        """The adapter that serves now, from which the training goes on; None where there is none yet.

        Raises:
            StackError: there is no such layer.
            FederationError: the adapter is new, and its layer is keyed.
        """
        layer = load(self.model).stack[self.layer]
        if self.name in layer.adapters:
            return Path(layer.adapters[self.name])
        if layer.keyed:
            raise FederationError(
                f"An adapter of the keyed layer {self.layer!r} is found by its questions, and none are here: begin "
                f"it by `molora update {self.layer} {self.name} --new RANK` with a few conversations."
            )
        return None

    def unrouted(self) -> Path | None:
        """The saved MoLoRA, if its router has to get a row for the adapter.

        Raises:
            StackError: there is no such layer.
            VersionError: the router keeps no samples to fit a row against.
        """
        saved = load(self.model)
        layer = saved.stack[self.layer]
        if self.name in layer.adapters or saved.router is None or not layer.routed:
            return None
        check_samples(saved.router)
        return self.model

    @property
    def base(self) -> str:
        return str(load(self.model).base)

    @property
    def versions(self) -> Versions:
        return Versions(self.model, self.layer, self.name)

    def begin(self, settings: FederateSettings, resume: bool = True) -> FederateSettings:
        """``settings`` with what a training goes on from: what serves. If that was made by this very training, which
        was killed before it told of it, what it began with.

        Raises:
            StackError, FederationError, VersionError: as of :meth:`served` and :meth:`unrouted`. DataError: the general
                conversations cannot be read.
        """
        known, current = Begun.read(settings.out) if resume else None, self.versions.current
        made = self.versions[current].data.get("run") if current is not None else None
        if known is not None and made is not None and made == self.mark(known.run, settings.rounds):
            return replace(settings, start=known.start, router=known.router, base=self.base)
        return replace(settings, start=self.served(), router=self.unrouted(), base=self.base)

    def mark(self, run: str, rounds: int) -> str:
        """What a version is known by that a training made after so many rounds: by other general conversations it is
        judged anew."""
        general = read_chats(self.general) if self.general is not None else None
        return hashlib.sha256(json.dumps([run, rounds, general], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """The version that was made. learnt: on what clients held out; kept: on what is remembered here; general: as in
    :class:`Into`. None: it was not measured."""

    version: int
    promoted: bool
    why: str
    learnt: Change | None
    kept: Change | None
    general: Change | None


def keep(
    federation: Federation, losses: Mapping[str, Losses], into: Into, command: str, about: Mapping[str, Any]
) -> Kept:
    """Makes a version of what was learnt, and lets it serve if it learnt something and lost little. One that an
    interrupted call has made is gone on with.

    Args:
        federation: whose rounds are over.
        losses: "before" and "after" of each client, or nothing.
        into: whose version it becomes.
        command: that made it.
        about: what else is to be kept of it.

    Raises:
        VersionError, AdapterError, DataError: as of :mod:`molora.versions` and of an update.
    """
    versions, run = into.versions, into.mark(federation.run, federation.round)
    version = next((one for one in versions.all() if one.data.get("run") == run), None)
    current, row = versions.current, None
    if version is not None and not (version.passed and current in (None, version.parent)):
        other = version.passed and current != version.number
        return _kept(version, current == version.number, f"version {current} serves by now" if other else version.why)
    if federation.settings.router is not None:
        saved = load(into.model)
        row = with_row(check_samples(saved.router), saved.stack, into.layer, into.name, federation.moments)
    if version is None:
        version = _judged(federation, losses, into, command, {"run": run}, about, row)
    if version.passed:
        versions.promote(version.number, router=None if row is None else row.router)
    return _kept(version, version.passed, version.why)


def _judged(
    federation: Federation, losses: Mapping[str, Losses], into: Into, command: str, data: Mapping[str, Any],
    about: Mapping[str, Any], row: NewRow | None,
) -> Version:  # fmt: skip
    """A version of what was learnt, which does not serve yet."""
    settings, versions = federation.settings, into.versions
    served, learnt = into.served(), change_of(losses.get("before", {}), losses.get("after", {}))
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / "adapter"
        federation.result().save(new, federation.config)
        how = UpdateSettings(into.model, into.layer, into.name, into.model, max_length=settings.local.max_length)
        judge = Judge(how, into.base, served or federation.blank, new)
        remembered = judge(Memory.load(into.model / versions.place / MEMORY).kept_apart)
        general = judge(read_chats(into.general)) if into.general is not None else None
        why = refusal(settings.limits.max_forgetting, learnt, remembered, general)
        if learnt is None and remembered is None and general is None:
            why = "nothing was measured of it: under privacy clients tell no losses, so name general conversations"
        if row is not None and not why:
            why = too_much_taken(row.taken, settings.limits.max_forgetting)
        return versions.add(
            new,
            command=command,
            data={"clients": len(_devices(federation)), "rounds": federation.round, **data},
            metrics={
                "learnt": learnt and asdict(learnt),
                "kept": remembered and asdict(remembered),
                "general": general and asdict(general),
                **({} if row is None else {"taken": row.taken}),
                **about,
            },
            passed=not why,
            why=why or (f"{-learnt.growth:.1%} less loss on what clients held out" if learnt else "it lost little"),
        )


def _kept(version: Version, promoted: bool, why: str) -> Kept:
    told = (version.metrics[name] for name in ("learnt", "kept", "general"))
    return Kept(version.number, promoted, why, *(one and Change(**one) for one in told))


def write(federation: Federation, out: Path) -> None:
    """The PEFT folder. What is there stays until the new one is whole."""
    draft = out.with_name(f"{PARTIAL}{out.name}")
    if draft.exists():  # of a writing that was interrupted
        remove_folder(draft)
    federation.result().save(draft, federation.config)
    place_folder(draft, out)


def change_of(before: Losses, after: Losses) -> Change | None:
    """Over the clients that told both; `chance` of their gains, one of each. None if there are none."""
    both = sorted(before.keys() & after.keys())
    tokens = sum(after[name]["tokens"] for name in both)
    if not tokens:
        return None
    gains = torch.tensor([before[name]["loss"] - after[name]["loss"] for name in both])
    return Change(
        int(sum(after[name]["conversations"] for name in both)),
        sum(before[name]["loss"] for name in both) / tokens,
        sum(after[name]["loss"] for name in both) / tokens,
        by_chance(gains),
    )


def report(federation: Federation, losses: Mapping[str, Losses], command: str, seconds: float) -> dict[str, Any]:
    """What is told of a training: rounds, what each client cost, losses, and what privacy is promised."""
    learnt = change_of(losses.get("before", {}), losses.get("after", {}))
    return {
        "command": command,
        "settings": asdict(federation.settings),
        "rounds": [asdict(one) for one in federation.reports],
        "clients": _devices(federation),
        "losses": dict(losses),
        "learnt": None if learnt is None else asdict(learnt),
        "privacy": None if federation.private is None else federation.private.report(),
        "seconds": round(seconds, 1),
    }


def _devices(federation: Federation) -> dict[str, dict[str, Any]]:
    """Of each client over all rounds: bytes up and down, seconds, the highest memory, rounds, refusals."""
    found: dict[str, dict[str, Any]] = {}
    for one in federation.reports:
        for name, row in one.clients.items():
            own = found.setdefault(name, {"rounds": 0, "refused": 0, "absent": 0})
            own["rounds"] += 1
            own["rank"] = row.get("rank")
            for key in ("bytes_up", "bytes_down", "seconds", "cpu_seconds"):
                if key in row:  # what went up masked is not counted
                    own[key] = round(own.get(key, 0) + row[key], 3)
            own["peak_bytes"] = max(own.get("peak_bytes", 0), row.get("peak_bytes", 0))
        for key, names in (("refused", one.refused), ("absent", one.absent)):
            for name in names:
                found.setdefault(name, {"rounds": 0, "refused": 0, "absent": 0})[key] += 1
    return found


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """A report as JSON has it."""

    def other(one: Any) -> Any:
        return asdict(one) if is_dataclass(one) and not isinstance(one, type) else str(one)

    return json.loads(json.dumps(found, default=other))
