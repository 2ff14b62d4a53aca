"""Train the pool of Personalized Pieces (Per-Pcs, EMNLP 2024): sharers, an adapter of each, its gates.

Sharers stand for all: histories are embedded and put into clusters, and the one who has said most in each shares. Each
adapter begins anew and learns from its own sharer's text alone, on top of what the task is for everybody if there is an
adapter of that. Several learn side by side.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from molora.adapter import Adapter
from molora.atomic import write_text
from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora.factors import Factors, of_adapter, write_factors
from molora.personalize.history import Interaction
from molora.personalize.pieces import PiecePool, PoolConfig, weights_digest
from molora.personalize.retrieval import text_of
from molora_training.checkpoint import save_tensors
from molora_training.data import Encoded, Example, data_dir, encode_within
from molora_training.data.people import read_people
from molora_training.data.read_people import Person
from molora_training.gates import train_gates
from molora_training.report import write_report
from molora_training.settings import work_folder
from molora_training.side_by_side import Schedule, module_names, train_adapters

METRICS = "metrics.json"
Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class PiecesSettings:
    """What is trained, and on whom.

    Args:
        out: folder of the pool.
        people: a set of `data/people-<set>.*.jsonl`; those who are held out share nothing.
        data: its folder.
        sharers: how many, at most.
        task: an adapter that acts beneath all of them: what the task is, whoever asks.
        rank, alpha, targets, learning_rate, epochs: of each sharer's adapter.
        gate_epochs, gate_learning_rate: of the gates.
        batch_tokens: of each sharer in a step. at_once: sharers in it.
        max_length: tokens of a conversation; longer ones are left out.
        dtype: of the base.
    """

    out: Path
    people: str
    data: Path = field(default_factory=data_dir)
    base: str = DEFAULT_BASE
    sharers: int = 50
    task: Path | None = None
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-4
    epochs: int = 2
    gate_epochs: int = 2
    gate_learning_rate: float = 2e-5
    batch_tokens: int = 512
    at_once: int = 8
    max_length: int = 1024
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("sharers", "at_once", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number from 1, not {getattr(self, name)}.")

    @property
    def work(self) -> Path:
        return work_folder("pieces", self.out)


def train(
    settings: PiecesSettings, encode: Encode, command: str | None = None, encoder_name: str = ""
) -> dict[str, Any]:
    """Trains and writes the pool; what an interrupted training has made is kept in ``settings.work``.

    Args:
        settings: what to train.
        encode: texts -> unit vectors [N, width], by which histories are put into clusters.
        command: the command line, for the metrics.
        encoder_name: of what encodes, as its users name it.

    Raises:
        DataError: the set is not prepared, or nobody in it shares.
        ConfigError: what an interrupted training has made is of other settings, or of other people.
    """
    started = time.monotonic()
    persons = [one for one in read_people(settings.people, settings.data) if not one.held_out and one.interactions()]
    if not persons:
        raise DataError(f"Nobody in the set {settings.people!r} has a history to share.")
    _same_settings(settings, persons)
    chosen = choose_sharers(persons, encode, settings.sharers, settings.seed)
    base, tokenizer = load_base(settings.base, dtype=getattr(torch, settings.dtype))
    base.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    rows = {one.id: history_rows(one, tokenizer, settings.max_length) for one in chosen}
    task = None if settings.task is None else of_adapter(Adapter.load(settings.task))
    sharing = _Sharing(settings, base, rows, tokenizer.pad_token_id or 0, task)
    adapters = sharing.adapters([one.id for one in chosen])
    gates = sharing.gates(adapters)
    beneath = "" if settings.task is None else weights_digest(settings.task)
    pool = pool_of(
        PoolConfig(settings.base, (), len(chosen), settings.rank, encoder_name, beneath),
        list(adapters.values()),
        [gates[name] for name in adapters],
    )
    pool.embeddings = torch.stack([mean_embedding(one, encode) for one in chosen])
    shutil.rmtree(settings.out, ignore_errors=True)
    pool.save(settings.out)
    metrics = {
        "sharers": len(chosen),
        "people": len(persons),
        "interactions": sum(len(one.interactions()) for one in chosen),
        "bytes": sum(file.stat().st_size for file in settings.out.iterdir()),
        "seconds": round(time.monotonic() - started, 1),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "command": command,
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
    }
    write_report(metrics, settings.out / METRICS)
    return metrics


def choose_sharers(persons: Sequence[Person], encode: Encode, count: int, seed: int = 0) -> list[Person]:
    """The one with the longest history of each cluster of mean embeddings, by k-means; in the order of ids."""
    if len(persons) <= count:
        return sorted(persons, key=lambda person: person.id)
    from sklearn.cluster import KMeans

    means = torch.stack([mean_embedding(person, encode) for person in persons])
    clusters = KMeans(count, random_state=seed, n_init=10).fit_predict(means.double().numpy())
    best: dict[int, Person] = {}
    for person, cluster in sorted(zip(persons, clusters.tolist(), strict=True), key=lambda pair: pair[0].id):
        if cluster not in best or len(person.interactions()) > len(best[cluster].interactions()):
            best[cluster] = person
    return sorted(best.values(), key=lambda person: person.id)


def mean_embedding(person: Person, encode: Encode) -> Tensor:
    """[width], over the person's history."""
    return encode([text_of(one) for one in person.interactions()]).mean(0)


def history_rows(person: Person, tokenizer: Any, max_length: int) -> list[Encoded]:
    """A person's history as an adapter's training reads it."""
    some = [one for one in person.asked if one.split == "train"]
    examples = [Example(one.id, person.id, "train", messages(one.interaction), one.form) for one in some]
    return encode_within(examples, tokenizer, max_length, [person.id])


def messages(one: Interaction) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer})


def pool_of(config: PoolConfig, adapters: Sequence[Factors], gates: Sequence[Mapping[str, Tensor]]) -> PiecePool:
    """The pool of some adapters of one shape; the modules of ``config`` are theirs."""
    modules = tuple(adapters[0])
    ranks = {len(A) for one in adapters for A, _ in one.values()}
    if ranks != {config.rank} or any(tuple(one) != modules for one in adapters):
        raise ConfigError("The sharers' adapters differ in rank or modules: train them by the same settings.")
    A = {name: torch.stack([one[name][0].float() for one in adapters]) for name in modules}
    B = {name: torch.stack([one[name][1].float() for one in adapters]) for name in modules}
    stacked = {name: torch.stack([own[name].float() for own in gates]) for name in modules}
    return PiecePool(replace(config, modules=modules), A, B, stacked)


class _Sharing:
    """Adapters and gates of the sharers, some at once; those that are there already are not trained again."""

    def __init__(
        self, settings: PiecesSettings, base: Any, rows: Mapping[str, Sequence[Encoded]], pad: int, task: Factors | None
    ) -> None:
        self.settings, self.base, self.rows, self.pad, self.task = settings, base, rows, pad, task

    def adapters(self, names: Sequence[str]) -> dict[str, Factors]:
        own = self.settings
        modules = module_names(self.base, own.targets)
        below = [] if self.task is None else [self.task]

        def train(some: Sequence[str]) -> None:
            rows = [self.rows[name] for name in some]
            how = Schedule(own.learning_rate, own.epochs, own.batch_tokens, weight_decay=1e-2, seed=own.seed)
            made = train_adapters(self.base, rows, self.pad, how, modules, own.rank, own.alpha, below)
            for name, factors in zip(some, made, strict=True):
                write_factors(folder(name), factors, own.base)

        def folder(name: str) -> Path:
            return own.work / "adapters" / name

        self._some([name for name in names if not folder(name).is_dir()], train, "sharers")
        return {name: of_adapter(Adapter.load(folder(name))) for name in names}

    def gates(self, adapters: Mapping[str, Factors]) -> dict[str, dict[str, Tensor]]:
        own = self.settings
        how = Schedule(own.gate_learning_rate, own.gate_epochs, own.batch_tokens, seed=own.seed)

        def train(some: Sequence[str]) -> None:
            rows = [self.rows[name] for name in some]
            made = train_gates(self.base, [adapters[name] for name in some], rows, self.pad, how, self.task)
            for name, gates in zip(some, made, strict=True):
                save_tensors(file(name), gates)

        def file(name: str) -> Path:
            return own.work / "gates" / f"{name}.safetensors"

        self._some([name for name in adapters if not file(name).is_file()], train, "gates")
        return {name: load_file(file(name)) for name in adapters}

    def _some(self, missing: Sequence[str], train: Callable[[Sequence[str]], None], shown: str) -> None:
        from tqdm.auto import tqdm

        # Those with as long a history go together, so that none waits for another's.
        order = sorted(missing, key=lambda name: (-len(self.rows[name]), name))
        with tqdm(total=len(order), desc=shown) as bar:
            for first in range(0, len(order), self.settings.at_once):
                some = order[first : first + self.settings.at_once]
                train(some)
                bar.update(len(some))


def _same_settings(settings: PiecesSettings, persons: Sequence[Person]) -> None:
    """Raises ConfigError where what an interrupted training has made is of other settings, or of other people."""
    beneath = "" if settings.task is None else weights_digest(settings.task)
    own = {k: _plain(v) for k, v in asdict(settings).items() if k not in ("out", "data", "sharers", "at_once")}
    people = hashlib.sha256(repr(persons).encode()).hexdigest()
    now = json.dumps({**own, "task": beneath, "persons": people}, sort_keys=True)
    note = settings.work / "settings.json"
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, now + "\n")
    elif note.read_text(encoding="utf-8") != now + "\n":
        raise ConfigError(
            f"{settings.work} holds sharers that were trained with other settings, or on other text: take those again, "
            f"or delete it."
        )


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value
