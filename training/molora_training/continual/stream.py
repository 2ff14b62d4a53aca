"""What updates do to users over time: a user's conversations come in parts, and every part is an update with its gate.

Told are, of all users, how often an update serves and is better on the new conversations, what it costs the older ones
and general text, and in the end how the version that then serves stands to the one that served when each part was new.
Users are kept as they are finished: an interrupted study goes on, and several processes may share it.
"""

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Stack, StackLayer
from molora.base import DEFAULT_BASE
from molora.errors import ConfigError, DataError
from molora.versions import Versions
from molora_training.continual.growth import blank
from molora_training.continual.memory import BYTES, held_out
from molora_training.continual.methods import MethodName
from molora_training.continual.update import Judge, UpdateSettings, as_examples, update
from molora_training.data import encode_within, read_examples
from molora_training.evaluate import losses
from molora_training.parts import finished
from molora_training.report import heading, line, write_report

LAYER = "user"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class StreamSettings:
    """A study of users.

    Args:
        users: names of prepared data.
        general: prepared data that has nothing to do with any of them. Of its validation split a fifth is measured; in
            the others an update is held to what the base says.
        data: where both are.
        updates, conversations: how many updates each user has, and how many conversations each brings; a few more where
            chance would hold none of them out.
        rank: of a user's adapter. memory: bytes of text that are kept of a user.
    """

    users: tuple[str, ...]
    general: str
    data: Path
    base: str = DEFAULT_BASE
    updates: int = 10
    conversations: int = 20
    general_count: int = 200
    rank: int = 8
    method: MethodName = "plain"
    memory: int = BYTES
    learning_rate: float = 2e-4
    epochs: int = 3
    max_length: int = 512
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if not self.users or len(set(self.users)) < len(self.users):
            raise ConfigError(f"Name users, each once, not {', '.join(self.users) or 'none'}.")
        if self.updates < 2 or self.conversations < 5 or self.general_count < 1:
            raise ConfigError("A stream takes two updates or more, of five conversations or more, and general text.")


def run(settings: StreamSettings, out: Path, command: str, share: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Runs the users that are not there yet and writes ``out`` once all are.

    Args:
        settings: what is studied.
        out: the report; what is finished lies in a hidden folder beside it.
        command: to be named in it.
        share: (i, n): of n processes the i-th, which runs every n-th user.

    Returns:
        The report, or None while users are missing.

    Raises:
        DataError: a user has fewer conversations than the updates take.
    """
    texts = {user: _text(settings, user) for user in settings.users}
    general = _rows(settings.data / f"{settings.general}.validation.jsonl")[: settings.general_count]
    if not any(map(held_out, general)):
        raise DataError(f"{settings.general}: {len(general)} conversations are too few, for none of them is held out.")
    record = {key: str(value) for key, value in asdict(settings).items() if key not in ("data", "users")}
    mark = hashlib.sha256(json.dumps([record, texts, general], sort_keys=True).encode()).hexdigest()

    def make(index: int) -> dict[str, Any]:
        user = settings.users[index]
        found = _user(settings, user, texts[user], general)
        served = sum(one["promoted"] for one in found["updates"])
        print(f"{user}: {served} of {settings.updates} updates serve, {found['seconds']} s", flush=True)
        return found

    kept = finished(out.parent / f".{out.stem}", settings.users, mark, share, make)
    if kept is None:
        return None
    report = _report(settings, dict(zip(settings.users, kept, strict=True)), command)
    write_report(report, out)
    return report


def _user(
    settings: StreamSettings, user: str, parts: Sequence[Sequence[Row]], general: Sequence[Row]
) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(folder / "general.jsonl", general)
        blank(settings.base, settings.rank, folder / "blank")
        stack = Stack([StackLayer(LAYER, {user: folder / "blank"}, shared=True)])
        MoLoRAModel.from_base(settings.base, stack).save_pretrained(folder / "model")
        how = UpdateSettings(
            folder / "model", LAYER, user, folder / "new.jsonl", folder / "general.jsonl", method=settings.method,
            memory=settings.memory, learning_rate=settings.learning_rate, epochs=settings.epochs,
            max_length=settings.max_length, batch_tokens=settings.batch_tokens,
        )  # fmt: skip
        mine = Versions(folder / "model", LAYER, user)
        updates, serving = [], []
        for part in parts:
            _write(how.data, part)
            found = update(how)
            updates.append(asdict(found))
            serving.append(mine.current or 1)
        last = mine.path(serving[-1])
        drift = []
        for number, part in zip(serving[:-1], parts[:-1], strict=True):
            judge = Judge(how, settings.base, mine.path(number), last)
            change = judge([row for row in part if held_out(row)])
            drift.append(None if change is None else change.growth)
        memory = how.model / mine.place / "memory.jsonl"
        return {
            "updates": updates,
            "drift": drift,
            "general": _without(how, settings.base, last, [row for row in general if held_out(row)]),
            "text_bytes": memory.stat().st_size if memory.is_file() else 0,
            "seconds": round(time.monotonic() - started, 1),
        }


def _without(how: UpdateSettings, base: str, adapter: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Nats a token of general text, of the base alone and with the adapter."""
    stack = Stack([StackLayer(LAYER, {"last": adapter}, default=None)])
    model = MoLoRAModel.from_base(base, stack, dtype=getattr(torch, how.chosen_dtype))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    encoded = encode_within(as_examples(rows, "general"), model.tokenizer, how.max_length, ["general"])
    base_loss, own = (
        losses(model, encoded, {LAYER: which}, 1, batch_tokens=how.batch_tokens).mean for which in (None, "last")
    )
    return {"base": base_loss, "adapter": own, "growth": own / base_loss - 1}


def _report(settings: StreamSettings, found: Mapping[str, dict[str, Any]], command: str) -> dict[str, Any]:
    updates = [one for user in found.values() for one in user["updates"]]
    better = [one["promoted"] and one["learnt"]["after"] < one["learnt"]["before"] for one in updates]
    older = [_growth(one["kept"]) for one in updates if one["promoted"] and one["kept"]]
    drift = [one for user in found.values() for one in user["drift"] if one is not None]
    general = [user["general"]["growth"] for user in found.values()]
    rows = [
        {
            "user": name,
            "promoted": sum(one["promoted"] for one in user["updates"]),
            "learnt": statistics.mean(_growth(one["learnt"]) for one in user["updates"]),
            "drift": statistics.mean(own) if (own := [one for one in user["drift"] if one is not None]) else None,
            "general": user["general"]["growth"],
            "update_seconds": statistics.median(one["seconds"] for one in user["updates"]),
            "text_bytes": user["text_bytes"],
            "why_not": [one["why"] for one in user["updates"] if not one["promoted"]],
        }
        for name, user in found.items()
    ]
    sets = f"{len(found)} users, {settings.updates} updates of {settings.conversations} conversations each"
    return {
        **heading(command, f"{sets}, of the training split; a fifth of each, by hash, is never learnt"),
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("data", "base", "users")},
        "rows": rows,
        "must": [
            line("updates that serve and are better on new conversations", statistics.mean(better), 0.9, "higher"),
            line("growth of loss on older conversations, by an update", statistics.mean(older or [0.0]), 0.02, "lower"),
            line("growth since it was new, in the end, mean", statistics.mean(drift or [0.0]), 0.02, "lower"),
            line("change of loss on general text, mean of users", statistics.mean(map(abs, general)), 0.01, "lower"),
            line("change of loss on general text, worst user", max(map(abs, general)), 0.01, "lower"),
        ],
    }


def _growth(change: Mapping[str, float]) -> float:
    return change["after"] / change["before"] - 1


def _text(settings: StreamSettings, user: str) -> list[list[Row]]:
    """The conversations of each update, in the order of the data: more of them where none would be held out."""
    rows = _rows(settings.data / f"{user}.train.jsonl")
    coming, size = iter(rows), settings.conversations
    parts = []
    for _ in range(settings.updates):
        part = list(itertools.islice(coming, size))
        while part and len({held_out(row) for row in part}) < 2 and (more := next(coming, None)):
            part.append(more)
        parts.append(part)
    if len(parts[-1]) < size or len({held_out(row) for row in parts[-1]}) < 2:
        raise DataError(
            f"{user} has {len(rows)} conversations, too few for {settings.updates} updates of {size}, some of each "
            f"held out: take fewer, or fewer at a time."
        )
    return parts


def _rows(file: Path) -> list[Row]:
    return [{"messages": list(example.messages)} for example in read_examples(file)]


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
