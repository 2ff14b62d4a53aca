"""A client: its conversations, and its answers to the server's orders. Factors and figures leave it, and no text."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from molora.base import load_base
from molora.errors import DataError, UpdateError
from molora_training.attention import attend_causally
from molora_training.batches import rounded
from molora_training.continual.memory import held_out
from molora_training.continual.update import as_examples, read_chats
from molora_training.data import Encoded, encode_within
from molora_training.federated import forward_only, local, row
from molora_training.federated.lora import Lora, read_bytes
from molora_training.federated.settings import LocalSettings
from molora_training.federated.usage import Usage, measured
from molora_training.settings import from_mapping


@dataclass(frozen=True)
class Order:
    """What the server sends: factors with what is to be done, what acts beneath them (`stack` alone), and what a client
    is to read its text by (an adapter that needs a row of the router alone)."""

    factors: bytes
    below: bytes = b""
    reader: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.factors) + len(self.below) + len(self.reader)


@dataclass(frozen=True)
class Learnt:
    """What a client makes of an order. moments: see :mod:`~molora_training.federated.row`."""

    lora: Lora
    about: Mapping[str, Any]
    usage: Usage
    moments: torch.Tensor | None = None

    def to_bytes(self) -> bytes:
        more = {} if self.moments is None else {row.MESSAGE: self.moments}
        return self.lora.to_bytes({**self.about, "usage": asdict(self.usage)}, more)


@dataclass
class Base:
    """A frozen base model with its tokenizer, loaded once for all clients of a process."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> "Base":
        """In float32 on a CPU, where that is faster, and in bfloat16 on a GPU."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_base(name, dtype=torch.float32 if device == "cpu" else torch.bfloat16, progress=False)
        return cls(model.to(device).requires_grad_(False), tokenizer)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0


@dataclass
class Client:
    """One client.

    Args:
        name: of its data, for the report.
        base: that its adapter is for.
        rows: its conversations. A fifth of them, by a hash of their text, is never learnt: by those it is judged.
    """

    name: str
    base: Base
    rows: Sequence[Mapping[str, Any]]
    encoded: dict[int, tuple[list[Encoded], list[Encoded]]] = field(default_factory=dict)

    @classmethod
    def of_file(cls, name: str, base: Base, file: Path) -> "Client":
        """With the conversations of a file.

        Raises:
            DataError: it cannot be read.
        """
        return cls(name, base, read_chats(file))

    @cached_property
    def split(self) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """What may be learnt, and what is held out."""
        apart = [held_out(row) for row in self.rows]
        learnt = [row for row, out in zip(self.rows, apart, strict=True) if not out]
        return learnt, [row for row, out in zip(self.rows, apart, strict=True) if out]

    def train(self, order: Order) -> Learnt:
        """Goes on from the order's factors.

        Raises:
            UpdateError: the order cannot be read.
            DataError: it has no conversation that is short enough.
            NonFiniteError: a loss is not finite.
        """
        lora, below, about = read_order(order)
        how = from_mapping(LocalSettings, about["local"])
        with measured() as usage:
            own = f"{about['seed']}/{self.name}"
            rows = local.drawn(self._rows(how.max_length)[0], how.examples, own)
            if not rows:
                raise DataError(f"{self.name} has no conversation of up to {how.max_length} tokens to learn from.")
            model, pad = self.base.model, self.base.pad_id
            attend_causally(model, rounded(how.max_length))
            way, seed = local.train, about["seed"]
            if how.method == "forward":  # directions that others do not look along: the same ones tell all of them less
                way, seed = forward_only.train, random.Random(own).getrandbits(32)
            learnt = way(model, pad, lora, rows, how, seed, about["frozen_a"], below)
            if about["clip"] is not None:
                learnt = clipped(lora, learnt, about["clip"])
            read = None
            if order.reader:
                read = row.moments(row.read_reader(order.reader), model, learnt, below, rows)
        answer = {"round": about["round"], "nonce": about["nonce"], "client": self.name, "examples": len(rows)}
        return Learnt(learnt, answer, usage, read)

    def evaluate(self, order: Order) -> dict[str, float]:
        """Nats on its held-out conversations under the order's factors: `loss` summed, `tokens`, `conversations`."""
        lora, below, about = read_order(order)
        how = from_mapping(LocalSettings, about["local"])
        rows = self._rows(how.max_length)[1][: how.judged]
        attend_causally(self.base.model, rounded(how.max_length))
        total, count = local.loss(self.base.model, self.base.pad_id, lora, rows, below)
        return {"loss": total, "tokens": count, "conversations": len(rows)}

    def _rows(self, max_length: int) -> tuple[list[Encoded], list[Encoded]]:
        if max_length not in self.encoded:
            learnt, apart = (
                encode_within(as_examples(rows, self.name), self.base.tokenizer, max_length, [self.name])
                for rows in self.split
            )
            self.encoded[max_length] = learnt, apart
        return self.encoded[max_length]


def read_order(order: Order) -> tuple[Lora, Lora | None, dict[str, Any]]:
    """The factors to go on from, those beneath, and what is said about them."""
    tensors, about, scale = read_bytes(order.factors)
    wanted = {"round", "nonce", "seed", "local", "frozen_a", "clip"}
    if wanted - about.keys():
        raise UpdateError(f"the order lacks {', '.join(sorted(wanted - about.keys()))}")
    below = None
    if order.below:
        beneath, _, own = read_bytes(order.below)
        below = Lora.from_tensors(beneath, own)
    return Lora.from_tensors(tensors, scale), below, about


def clipped(before: Lora, after: Lora, most: float) -> Lora:
    """``after`` with what it changed of B scaled down to an L2 norm of ``most``; A is as before."""
    changes = {name: b - before.pairs[name][1] for name, (_, b) in after.pairs.items()}
    norm = math.sqrt(sum(float(change.double().square().sum()) for change in changes.values()))
    share = min(1.0, most / norm) if norm > 0 else 1.0
    pairs = {name: (before.pairs[name][0], before.pairs[name][1] + share * change) for name, change in changes.items()}
    return Lora(pairs, after.scale)
