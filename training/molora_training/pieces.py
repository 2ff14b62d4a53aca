"""Train the pool of Personalized Pieces (Per-Pcs, EMNLP 2024): sharers, an adapter of each, its gates.

Sharers stand for all: histories are embedded and put into clusters, and the one who has said most in each shares. Each
adapter begins anew, from its own sharer's text alone.
"""

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
from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora.personalize.history import Interaction
from molora.personalize.pieces import PiecePool, PoolConfig
from molora.personalize.retrieval import text_of
from molora_training import adapter
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.checkpoint import save_tensors
from molora_training.data import Example, Split, data_dir, encode_within, read_examples, write_examples
from molora_training.data.people import read_people
from molora_training.data.read_people import Person
from molora_training.gates import train_gates
from molora_training.report import write_report
from molora_training.settings import work_folder

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
        rank, alpha, targets, learning_rate, epochs, batch_tokens: of each sharer's adapter.
        gate_epochs, gate_learning_rate: of the gates.
        max_length: tokens of a conversation; longer ones are left out.
        dtype: of the base.
    """

    out: Path
    people: str
    data: Path = field(default_factory=data_dir)
    base: str = DEFAULT_BASE
    sharers: int = 50
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-4
    epochs: int = 2
    batch_tokens: int = 2048
    gate_epochs: int = 2
    gate_learning_rate: float = 2e-5
    max_length: int = 1024
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.sharers < 1:
            raise ConfigError(f"sharers must be a whole number from 1, not {self.sharers}.")

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
    """
    from tqdm.auto import tqdm

    started = time.monotonic()
    persons = [one for one in read_people(settings.people, settings.data) if not one.held_out and one.interactions()]
    if not persons:
        raise DataError(f"Nobody in the set {settings.people!r} has a history to share.")
    chosen = choose_sharers(persons, encode, settings.sharers, settings.seed)
    files = {person.id: _files(settings, person) for person in chosen}
    adapters = {}
    for person in tqdm(chosen, desc="sharers"):
        made = _adapter_settings(settings, files[person.id], person.id)
        if not (made.out / "metrics.json").is_file():
            adapter.train(made, command=command)
        adapters[person.id] = Adapter.load(made.out)
    base, tokenizer = load_base(settings.base, dtype=getattr(torch, settings.dtype))
    base.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    gates = {}
    for person in tqdm(chosen, desc="gates"):
        file = settings.work / "gates" / f"{person.id}.safetensors"
        if not file.is_file():
            rows = encode_within(read_examples(files[person.id].train), tokenizer, settings.max_length, [person.id])
            found = train_gates(
                base, adapters[person.id], rows, tokenizer.pad_token_id or 0, epochs=settings.gate_epochs,
                learning_rate=settings.gate_learning_rate, batch_tokens=settings.batch_tokens, seed=settings.seed,
            )  # fmt: skip
            save_tensors(file, found)
        gates[person.id] = load_file(file)
    pool = pool_of(settings.base, [adapters[one.id] for one in chosen], [gates[one.id] for one in chosen])
    pool.embeddings = torch.stack([mean_embedding(one, encode) for one in chosen])
    pool.config = replace(pool.config, encoder=encoder_name)
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


def pool_of(base_name: str, adapters: Sequence[Adapter], gates: Sequence[Mapping[str, Tensor]]) -> PiecePool:
    """The pool of some adapters of one shape."""
    modules = tuple(adapters[0].modules)
    ranks = {weights.rank for one in adapters for weights in one.modules.values()}
    if len(ranks) != 1 or any(tuple(one.modules) != modules for one in adapters):
        raise ConfigError("The sharers' adapters differ in rank or modules: train them by the same settings.")
    A = {name: torch.stack([one.modules[name].A.float() for one in adapters]) for name in modules}
    B = {
        name: torch.stack([one.modules[name].B.float() * one.modules[name].scale for one in adapters])
        for name in modules
    }
    stacked = {name: torch.stack([own[name].float() for own in gates]) for name in modules}
    return PiecePool(PoolConfig(base_name, modules, len(adapters), ranks.pop()), A, B, stacked)


def _files(settings: PiecesSettings, person: Person) -> DataFiles:
    """The person's conversations, as an adapter's training reads them; one without held-out ones is judged by all."""
    places: dict[Split, Path] = {}
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        some = [one for one in person.asked if one.split == split] or [
            one for one in person.asked if one.split == "train"
        ]
        rows = [Example(one.id, person.id, split, _messages(one.interaction), one.form) for one in some]
        places[split] = settings.work / "data" / f"{person.id}.{split}.jsonl"
        write_examples(places[split], rows)
    return DataFiles(places["train"], places["validation"], settings.max_length)


def _adapter_settings(settings: PiecesSettings, files: DataFiles, person: str) -> AdapterTrainSettings:
    return AdapterTrainSettings(
        out=settings.work / "adapters" / person,
        data=files,
        lora=LoraShape(rank=settings.rank, alpha=settings.alpha, targets=settings.targets),
        base=settings.base,
        learning_rate=settings.learning_rate,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        seed=settings.seed,
        dtype=settings.dtype,
    )


def _messages(one: Interaction) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer})


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else value
