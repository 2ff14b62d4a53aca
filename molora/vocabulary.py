"""The router that looks up token ids in rules, without learning anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from molora.errors import RouterError
from molora.memory import Averages, Memory
from molora.router import NEVER, Float32


class VocabularyPart(Float32):
    """Routes by token id alone: its z is the logits themselves."""

    reads = 0

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table)  # [vocabulary, rows]

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        raise RouterError("A vocabulary router needs input_ids; inputs_embeds alone do not tell it the tokens.")

    def read_ids(self, input_ids: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.table)

    def signature(self) -> object:
        return "vocabulary", self.table.shape[1]

    def new_memory(self, batch: int, owner: object) -> Memory:
        rule = Averages(self.table.new_zeros(0), self.table.shape[1])
        return Memory(batch, rule.width, rule, owner)

    def features(self, z: torch.Tensor, real: torch.Tensor, memory: Memory | None) -> torch.Tensor:
        if memory is not None:
            memory.append(z, real)
        return z

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return q


class VocabularyRouter(nn.Module):
    """The vocabulary routing of MoLoRA (arXiv 2603.15965): token ids or ranges of them -> adapter.

    Args:
        rules: "layer/adapter" -> list of ids and of [first, last] ranges (both included). Later rules win; tokens
            without a rule get no adapter.
        rows: as for :class:`Router`.
        vocabulary: number of token ids.
    """

    weights = "unit"
    points = (0,)

    def __init__(self, rules: Mapping[str, Sequence[Any]], rows: Sequence[str], vocabulary: int) -> None:
        super().__init__()
        self.rows = list(rows)
        if not isinstance(vocabulary, int) or vocabulary < 1 or not isinstance(rules, Mapping):
            raise RouterError(
                "A vocabulary router needs rules {'layer/adapter': [ids and ranges]} and a vocabulary size."
            )
        self.rules = {name: _spans(name, spans, vocabulary) for name, spans in rules.items()}
        table = torch.full((vocabulary, len(self.rows)), NEVER)
        nulls = [i for i, row in enumerate(self.rows) if row.endswith("/none")]
        table[:, nulls] = NEVER / 2  # above every adapter that no rule gives
        for name, spans in self.rules.items():
            if name not in self.rows:
                raise RouterError(f"A vocabulary rule names {name!r}; the stack has {', '.join(self.rows)}.")
            layer = name.split("/")[0]
            others = [i for i, row in enumerate(self.rows) if row.split("/")[0] == layer and i not in nulls]
            for first, last in spans:
                table[first : last + 1, others] = NEVER
                table[first : last + 1, self.rows.index(name)] = 0
        self.parts = nn.ModuleList([VocabularyPart(table)])
        self.vocabulary = vocabulary

    def check(self, rows: Sequence[str], hidden_size: int, layers: int, vocabulary: int) -> None:
        """As :meth:`Router.check`."""
        if sorted(self.rows) != sorted(rows):
            raise RouterError(f"This router was made for {', '.join(self.rows)}; the stack has {', '.join(rows)}.")
        if self.vocabulary < vocabulary:
            raise RouterError(f"This router knows {self.vocabulary} token ids, and the base has {vocabulary}.")


def _spans(name: str, spans: Any, vocabulary: int) -> list[tuple[int, int]]:
    """Ids and [first, last] ranges as ranges. Raises RouterError for what is neither or out of the vocabulary."""
    found = []
    for span in spans if isinstance(spans, list | tuple | range | set) else [spans]:
        pair = [span, span] if isinstance(span, int) else span
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(id_, int) for id_ in pair)
        if not whole or not isinstance(spans, list | tuple | range | set) or not 0 <= pair[0] <= pair[1] < vocabulary:
            raise RouterError(
                f"The rule of {name!r} has {span!r}; give token ids and [first, last] ranges between 0 and "
                f"{vocabulary - 1}."
            )
        found.append((pair[0], pair[1]))
    return found
