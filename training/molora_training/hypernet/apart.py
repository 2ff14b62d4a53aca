"""Conversations that have nothing to do with any text: what is asked there is answered as by the base alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora_training.data import Encoded, encode_within, read_examples

LENGTH = 256  # tokens of a conversation at most


@dataclass(frozen=True)
class Apart:
    """The training splits of prepared data.

    folder: of the files. names: of the sets; ``<name>.train.jsonl``. seed: of the order.
    """

    folder: Path
    names: Sequence[str]
    tokenizer: Any
    seed: int = 0
    rows: list[Encoded] = field(init=False)

    def __post_init__(self) -> None:
        found = [
            row
            for name in self.names
            for row in encode_within(read_examples(self.folder / f"{name}.train.jsonl"), self.tokenizer, LENGTH, [name])
        ]
        object.__setattr__(self, "rows", found)

    def of_step(self, step: int, count: int) -> list[Encoded]:
        """Those of a training step: by its number alone; none where there are no sets."""
        chance = random.Random(f"apart/{self.seed}/{step}")
        return [chance.choice(self.rows) for _ in range(count)] if self.rows else []
