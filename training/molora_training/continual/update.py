"""A new version of an adapter from new conversations, which serves only if little of what it knew is lost.

The version before goes on with the new conversations and as many of the remembered ones (replay). What it learnt is
told by the new conversations that are held out, what it lost by the remembered ones that are: none is trained on ever.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import release_memory
from filelock import FileLock, Timeout

from molora import MoLoRAModel, Stack, StackLayer
from molora.adapter import Adapter
from molora.errors import ConfigError, DataError, VersionError
from molora.key_file import read_key, write_key
from molora.saved import load
from molora.versions import Versions
from molora_training import adapter
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.continual.chance import by_chance
from molora_training.continual.edits import NewKey, NewRow, check_samples, new_key, new_row, too_much_taken
from molora_training.continual.growth import blank
from molora_training.continual.invented import invent
from molora_training.continual.memory import BYTES, Memory, held_out, key
from molora_training.continual.method import Method, Task, first_rows
from molora_training.continual.methods import METHODS, MethodName
from molora_training.continual.steady import Steady
from molora_training.data import Encoded, Example, encode_within, write_examples
from molora_training.evaluate import losses

MEMORY = "memory.jsonl"
WORK = ".work"
_LAYER = "update"


@dataclass(frozen=True)
class UpdateSettings:
    """One update.

    Args:
        model: a saved MoLoRA.
        layer, name: of the adapter.
        data: new conversations, one JSON object with `messages` a line.
        general: conversations that have nothing to do with the adapter. A fifth of them tells what it does to such; in
            the others it is held to what the base says. None: nothing is held or told.
        hold: how strongly. With 10 general text still moves by up to 2%, and with 100 an update learns a fifth of what
            it could.
        max_forgetting: how much the loss on remembered and on general conversations may grow, as a share.
        memory: bytes of conversations that are remembered beside the adapter's versions; 0: no text is kept, nothing is
            replayed, and what is forgotten is told by ``general`` alone.
        invent: how many conversations the version that serves makes up itself, to be replayed too.
        method: how it is held back while it learns: see :mod:`molora_training.continual.methods`.
        new: the rank of an adapter that is not there yet and begins with this update; None: it is there.
        max_length: tokens; longer conversations are left out.
        dtype: of the frozen base. None: bfloat16 on a GPU, float32 on a CPU, where it is faster.
    """

    model: Path
    layer: str
    name: str
    data: Path
    general: Path | None = None
    hold: float = 30.0
    max_forgetting: float = 0.02
    memory: int = BYTES
    invent: int = 0
    method: MethodName = "plain"
    new: int | None = None
    learning_rate: float = 2e-4
    epochs: int = 3
    max_length: int = 1024
    batch_tokens: int = 4096
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        if min(self.hold, self.max_forgetting, self.memory, self.invent) < 0:
            raise ConfigError("hold, max_forgetting, memory and invent must not be negative.")
        if self.new is not None and self.new < 1:
            raise ConfigError(f"A new adapter has a rank of 1 or more, not {self.new}.")
        if self.method not in METHODS:
            raise ConfigError(f"The method must be one of {', '.join(METHODS)}, not {self.method!r}.")

    @property
    def chosen_dtype(self) -> Literal["bfloat16", "float32"]:
        """``dtype``, or what is best here."""
        return self.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


@dataclass(frozen=True)
class Change:
    """Nats an answer token of so many held-out conversations, under the version that serves and under the new one.

    chance: how often chance alone lowers it as much: see :mod:`molora_training.continual.chance`.
    """

    conversations: int
    before: float
    after: float
    chance: float

    @property
    def growth(self) -> float:
        """By which share it grew."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Updated:
    """What came of an update.

    learnt: on the new conversations. kept: on the remembered ones, None where there are none. general: on those that
    have nothing to do with it, None where there are none. found: in a keyed layer the share of the new conversations'
    questions that find the adapter.
    """

    version: int
    parent: int | None
    promoted: bool
    why: str
    learnt: Change
    kept: Change | None
    general: Change | None
    found: float | None
    replayed: int
    seconds: float


def update(settings: UpdateSettings, command: str | None = None) -> Updated:
    """Trains, measures, keeps the new version, and lets it serve if it passed.

    Raises:
        StackError, AdapterError: there is no such layer, or the adapter cannot be trained on.
        DataError: the conversations are none, or too few for one to be held out.
        VersionError: there is no such adapter, or one where it was to be new; a new one cannot be found by the router,
            which keeps no samples; another update of it is running.
    """
    started = time.monotonic()
    versions = Versions(settings.model, settings.layer, settings.name)
    saved = load(settings.model)
    layer = saved.stack[settings.layer]
    _check_name(settings, layer)
    to_route = settings.new is not None and saved.router is not None and layer.routed
    if to_route:
        check_samples(saved.router)
    place = settings.model / versions.place
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".update.lock", timeout=0):
            base = str(saved.base)
            served = Path(layer.adapters[settings.name]) if settings.new is None else _begun(settings, versions, base)
            return _update(settings, command, versions, base, served, layer, to_route, started)
    except Timeout:
        raise VersionError(f"Another update of {versions.label} is running.") from None


@contextmanager
def working(place: Path) -> Iterator[Path]:
    """A folder beside an adapter's versions for what is learnt from, gone afterwards. What a killed call has left of it
    goes before: in a place for all that is temporary, nobody would look after its text."""
    work = place / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_name(settings: UpdateSettings, layer: StackLayer) -> None:
    """Raises VersionError: the adapter is not there, or is and was to be new."""
    there = settings.name in layer.adapters
    if settings.new is not None and there:
        raise VersionError(f"The layer {layer.name!r} has an adapter {settings.name!r} already: leave `new` out.")
    if settings.new is None and not there:
        known = ", ".join(layer.adapters) or "none at all"
        raise VersionError(
            f"The layer {layer.name!r} has no adapter {settings.name!r}; it has {known}. Begin one with `--new 8`, its "
            f"rank (in Python `new=8`)."
        )


def _begun(settings: UpdateSettings, versions: Versions, base: str) -> Path:
    """The first version of a new adapter, which does nothing: what has to forget all is made anew from it."""
    assert settings.new is not None
    root = versions.root()
    if root is None:
        with tempfile.TemporaryDirectory() as scratch:
            blank(base, settings.new, Path(scratch) / "blank", settings.seed)
            root = versions.add(Path(scratch) / "blank", why="it does nothing yet")
    elif (rank := Adapter.load(versions.path(root.number)).ranks[0]) != settings.new:
        raise VersionError(
            f"{versions.label} was begun with rank {rank} and does not serve yet: go on with that, or take it away by "
            f"`molora forget {settings.layer} {settings.name} --all`."
        )
    return versions.path(root.number)


def _update(
    settings: UpdateSettings, command: str | None, versions: Versions, base: str, served: Path, layer: StackLayer,
    to_route: bool, started: float,
) -> Updated:  # fmt: skip
    file = settings.model / versions.place / MEMORY
    if not settings.memory:
        file.unlink(missing_ok=True)  # no text is no text
    memory = Memory.load(file, settings.memory) if settings.memory else Memory()
    known = {key(row) for row in memory.rows}
    rows = [row for row in read_chats(settings.data) if key(row) not in known]
    new = [row for row in rows if not held_out(row)]
    apart = [row for row in rows if held_out(row)]
    if not new or not apart:
        raise DataError(
            f"{settings.data} holds {len(rows)} new conversations, {len(apart)} of which are held out to judge the "
            f"update by. Of twenty or more that is about a fifth; one at least is needed, and one to learn."
        )
    replayed = [*memory.taught[: len(new)], *made_up(settings, base, served)]
    with working(settings.model / versions.place) as work:
        write_chats(work / "train.jsonl", [*new, *replayed], settings.name)
        write_chats(work / "validation.jsonl", [*apart, *memory.kept_apart], settings.name)
        state = settings.model / versions.place / f"{settings.method}.safetensors"
        general_rows = read_chats(settings.general) if settings.general else []
        general_apart = [row for row in general_rows if held_out(row)]
        if general_rows and not general_apart:
            raise DataError(
                f"{settings.general}: none of its {len(general_rows)} conversations is held out to judge by; of twenty "
                f"or more that is about a fifth."
            )
        steady = [row for row in general_rows if not held_out(row)]
        method, learner, trained = learn(settings, base, served, state, new, work, command, steady)
        judge = Judge(settings, base, served, learner)
        learnt = judge(apart)
        if learnt is None:
            raise DataError(f"{settings.data}: every held-out conversation is over {settings.max_length} tokens long.")
        kept = judge(memory.kept_apart)
        general = judge(general_apart)
        if trained["best_step"]:
            why = refusal(settings.max_forgetting, learnt, kept, general)
        else:
            why = "no step was better than none"
        by: NewRow | NewKey | None = None
        if layer.keyed and not why:
            others = {n: k for n, path in layer.adapters.items() if (k := read_key(Path(path))) is not None}
            before = others.pop(settings.name, None)
            encoded = (judge.encode(new), judge.encode(apart))
            by = new_key(judge.model.base, others, before, *encoded, settings.batch_tokens)
            write_key(learner, by.questions)
        elif to_route and not why:
            dtype = getattr(torch, settings.chosen_dtype)
            by = new_row(settings.model, settings.layer, settings.name, learner, new, dtype)
        if by is not None:
            why = too_much_taken(by.taken, settings.max_forgetting)
        found = by.found if isinstance(by, NewKey) else None
        version = versions.add(
            learner,
            command=command,
            data={
                "sha256": hashlib.sha256(settings.data.read_bytes()).hexdigest(),
                "conversations": len(rows),
                "replayed": len(replayed),
            },
            metrics={
                "learnt": asdict(learnt),
                "kept": kept and asdict(kept),
                "general": general and asdict(general),
                "method": settings.method,
                "steps": trained["steps"],
                "best_step": trained["best_step"],
                **({} if by is None else {"taken": by.taken}),
                **({} if found is None else {"found": found}),
            },
            passed=not why,
            why=why or f"{-learnt.growth:.1%} less loss on new conversations",
        )
    if not why:
        versions.promote(version.number, router=by.router if isinstance(by, NewRow) else None)
        if settings.memory:
            memory.with_(rows).save(file)
        method.keep(versions.path(version.number))
    return Updated(
        version=version.number,
        parent=version.parent,
        promoted=not why,
        why=version.why,
        learnt=learnt,
        kept=kept,
        general=general,
        found=found,
        replayed=len(replayed),
        seconds=round(time.monotonic() - started, 1),
    )


def made_up(settings: UpdateSettings, base: str, served: Path) -> list[Mapping[str, Any]]:
    """The conversations that ``served`` makes up, as many as the settings say."""
    if not settings.invent:
        return []
    return invent(base, served, settings.invent, getattr(torch, settings.chosen_dtype), settings.seed)


def learn(
    settings: UpdateSettings,
    base: str,
    served: Path,
    state: Path,
    new: Sequence[Mapping[str, Any]],
    work: Path,
    command: str | None = None,
    steady: Sequence[Mapping[str, Any]] = (),
) -> tuple[Method, Path, dict[str, Any]]:
    """Goes on from ``served`` by the settings' method, with train.jsonl and validation.jsonl in ``work``.

    Args:
        state: the file of what the method knows of earlier tasks.
        new: what of train.jsonl was not learnt before.
        steady: conversations in the first 64 of which it is held to what the base says.

    Returns:
        The method, which is to :meth:`~Method.keep` what comes out if that is kept; its folder in ``work``; the
        trainer's metrics.
    """
    task = Task(
        base=base,
        examples=as_examples(new, settings.name),
        max_length=settings.max_length,
        dtype=getattr(torch, settings.chosen_dtype),
        state=state,
        seed=settings.seed,
    )
    method = METHODS[settings.method](task)
    training = training_settings(settings, base, method.start(served, work), work)
    general = first_rows(replace(task, examples=as_examples(steady, settings.name))) if steady else []
    hold = Steady(method, general, settings.hold) if general else method
    trained = adapter.train(training, resume=False, command=command, hold=hold)
    release_memory()  # of a GPU: other processes may be on it
    shutil.rmtree(training.work, ignore_errors=True)
    return method, method.finish(training.out, work), trained


def training_settings(settings: UpdateSettings, base: str, start: Path, work: Path) -> AdapterTrainSettings:
    """Of a training from ``start`` on train.jsonl and validation.jsonl in ``work``, into a folder there."""
    return AdapterTrainSettings(
        out=work / settings.name,
        data=DataFiles(work / "train.jsonl", work / "validation.jsonl", settings.max_length),
        lora=LoraShape(),
        base=base,
        start=start,
        learning_rate=settings.learning_rate,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        checkpoint_every=10,
        seed=settings.seed,
        dtype=settings.chosen_dtype,
    )


def read_chats(file: Path) -> list[Mapping[str, Any]]:
    """The conversations of a file, each once.

    Raises:
        DataError: it cannot be read, or a line is no conversation; it is named.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}).") from None
    found: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            roles = [message["role"] for message in row["messages"]]
            found[key(row)] = {"messages": row["messages"]}
        except (ValueError, TypeError, KeyError):
            roles = []
        if "user" not in roles or "assistant" not in roles:
            raise DataError(f'{file}, line {number} is no conversation: {{"messages": [{{"role": ...}}, ...]}}.')
    return list(found.values())


class Judge:
    """Two versions, one that is there and a new one, on the same conversations."""

    def __init__(self, settings: UpdateSettings, base: str, served: Path, new: Path) -> None:
        stack = Stack([StackLayer(_LAYER, {"before": served, "after": new}, default=None)])
        self.settings = settings
        self.model = MoLoRAModel.from_base(base, stack, dtype=getattr(torch, settings.chosen_dtype))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Those of the conversations that are not too long."""
        examples = as_examples(rows, self.settings.name)
        return encode_within(examples, self.model.tokenizer, self.settings.max_length, [self.settings.name])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Change | None:
        settings, encoded = self.settings, self.encode(rows)
        if not encoded:
            return None
        before, after = (
            losses(self.model, encoded, {_LAYER: which}, 1, batch_tokens=settings.batch_tokens)
            for which in ("before", "after")
        )
        gains = (before.loss - after.loss).sum(1)  # nats a conversation, as the mean over tokens weighs them
        return Change(len(encoded), before.mean, after.mean, by_chance(gains))


def refusal(max_forgetting: float, learnt: Change | None, kept: Change | None, general: Change | None) -> str:
    """Why the new version may not serve; nothing if it may. What was not measured says nothing against it."""
    if learnt is not None and not learnt.after < learnt.before:
        return f"nothing was learnt: loss on new conversations {learnt.before:.4f} -> {learnt.after:.4f}"
    for what, change in (("remembered", kept), ("general", general)):
        if change is not None and not change.growth <= max_forgetting:
            most = f"which may be {max_forgetting:.1%} at most"
            return f"loss on {what} conversations grew by {change.growth:.1%}, {most}"
    return ""


def as_examples(rows: Iterable[Mapping[str, Any]], name: str) -> list[Example]:
    """Conversations as examples of one domain, known by a hash of their text."""
    return [Example(key(row)[:16], name, "train", tuple(row["messages"])) for row in rows]


def write_chats(file: Path, rows: Iterable[Mapping[str, Any]], name: str) -> None:
    """Conversations as a data file of the adapter's trainer."""
    write_examples(file, as_examples(rows, name))
