"""Held-out text that changes its domain in several ways, and the training text that rivals of the router learn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel
from molora.errors import ConfigError, DataError
from molora_training.data import (
    IGNORED,
    KINDS,
    Encoded,
    Example,
    Split,
    both_file,
    encode_within,
    mix,
    mix_all_ways,
    mix_documents,
    mix_in_a_turn,
    read_examples,
    read_mixed,
)
from molora_training.data.text import approx_tokens
from molora_training.evaluate import LAYER

COUNT = 300  # sequences of each set
TRAINED = 400  # training examples of each domain that rivals learn from
MIXED = (300, 200, 200, 100)  # training texts of several domains: by turns, documents, two in a turn, asides
MAX_TOKENS = 2048
SHOT_TOKENS = 100  # of an example in a prompt
TURNS, UNSEEN, DOCUMENTS, IN_A_TURN = "turns", "turns, unseen forms", "documents", "two in a turn"


class QualitySets:
    """Sequences of tokens for one MoLoRA's domain layer.

    Args:
        model: whose domains, tokenizer and chat format.
        data: prepared data of every domain of its domain layer, and where it is there the questions that need two.
        limit: only so many sequences of each set (0: all), and of training four times as many.
        split: "test", or "validation" to choose by, which has no unseen forms.

    Raises:
        ConfigError: fewer than two domains. DataError: a domain has no data.
    """

    def __init__(self, model: MoLoRAModel, data: Path, limit: int = 0, split: Split = "test") -> None:
        self.domains = list(model.stack[LAYER].adapters)
        if len(self.domains) < 2:
            raise ConfigError(f"The layer '{LAYER}' has {len(self.domains)} adapters: there is nothing to route.")
        self.tokenizer, self.data, self.limit, self.split = model.tokenizer, data, limit, split
        some = slice(limit or None)
        held_out = self.examples(split)
        self.mixed = {TURNS: self.encode(mix(held_out, split, COUNT)[some])}
        if split == "test":
            unseen = {name: [example for example in rows if example.unseen] for name, rows in held_out.items()}
            if empty := [name for name, rows in unseen.items() if not rows]:
                raise DataError(f"{empty[0]} has no test example in a form that training never saw.")
            self.mixed[UNSEEN] = self.encode(mix(unseen, split, COUNT, seed=1)[some])
        self.mixed[DOCUMENTS] = self.encode(mix_documents(held_out, split, COUNT)[some])
        self.mixed[IN_A_TURN] = self.encode(mix_in_a_turn(held_out, split, COUNT)[some])
        for kind, needed in KINDS.items():
            file = data / both_file(kind, split)
            if set(needed) <= set(self.domains) and file.is_file():
                self.mixed[kind] = self.encode(read_mixed(file)[some])
        self.single = {name: self.encode(rows[some]) for name, rows in held_out.items()}

    def examples(self, split: Split) -> dict[str, list[Example]]:
        return {name: read_examples(self.data / f"{name}.{split}.jsonl") for name in self.domains}

    def encode(self, rows: Sequence[Any]) -> list[Encoded]:
        return encode_within(rows, self.tokenizer, MAX_TOKENS, self.domains)

    def questions(self, most: int | None = TRAINED) -> list[Encoded]:
        """Single training conversations, up to ``most`` of each domain: a classifier learns from few."""
        if self.limit:
            most = min(most or 4 * self.limit, 4 * self.limit)
        return self.encode([one for rows in self.examples("train").values() for one in rows[:most]])

    def training(self, seed: int = 0) -> list[Encoded]:
        """Training texts of several domains, as a router learns from."""
        counts = [min(count, 4 * self.limit) if self.limit else count for count in MIXED]
        return self.encode(mix_all_ways(self.examples("train"), "train", counts, seed))

    def shots(self) -> Encoded:
        """One short training example of each domain, as a conversation that goes before another."""
        chosen = [min(rows, key=_beyond) for rows in self.examples("train").values()]
        together = [message for example in chosen for message in example.messages]
        whole = Example("shots", self.domains[0], "train", tuple(together))
        return self.encode([whole])[0]

    def described(self) -> str:
        """How many sequences of what."""
        return ", ".join(f"{len(rows)} {name}" for name, rows in {**self.mixed, **self.single}.items())


def after(shots: Encoded, row: Encoded) -> Encoded:
    """A row behind ``shots``, of which nothing is counted."""
    none = torch.full_like(shots.labels, IGNORED)
    return Encoded(
        input_ids=torch.cat([shots.input_ids, row.input_ids]),
        labels=torch.cat([none, row.labels]),
        segments=torch.cat([shots.segments, row.segments + int(shots.segments.max()) + 1]),
        domain_ids=torch.cat([shots.domain_ids, row.domain_ids]),
    )


def _beyond(example: Example) -> int:
    """By how many tokens it is over what a prompt has room for: the first that is not is the one to take."""
    return max(0, sum(approx_tokens(message["content"]) for message in example.messages) - SHOT_TOKENS)
