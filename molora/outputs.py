"""What a routed forward returns: the base's output and the routes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass(frozen=True)
class Routes:
    """Which adapters acted on each token of a forward.

    slots: [batch, tokens, S] int64, -1 for none; weights: [batch, tokens, S] float32 (in the layers from the deepest
    reading point on). names: slot -> "layer/adapter". columns: the stack layer of each of the S columns, None for those
    that hold what a selection forces beyond them. logits: by
    part of the router [batch, tokens, rows], None for a part that was not asked; rows: their names. real: [batch,
    tokens] bool, False at padding.
    """

    slots: torch.Tensor
    weights: torch.Tensor
    names: list[str]
    columns: list[str | None]
    logits: list[torch.Tensor | None]
    rows: list[str]
    real: torch.Tensor

    def at(self, sequence: int, token: int) -> list[tuple[str, str | None, float]]:
        """(layer, adapter or None, weight) of each column at one token."""
        return read_plan(self.slots[sequence, token], self.weights[sequence, token], self.names, self.columns)

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row for each sequence, token and column."""
        import pandas

        rows = []
        for sequence, token in self.real.nonzero().tolist():
            for layer, adapter, weight in self.at(sequence, token):
                rows.append((sequence, token, layer, adapter, weight))
        return pandas.DataFrame(rows, columns=["sequence", "token", "layer", "adapter", "weight"])


def read_plan(
    slots: torch.Tensor, weights: torch.Tensor, names: list[str], columns: list[str | None]
) -> list[tuple[str, str | None, float]]:
    """(layer, adapter or None, weight) of each column of one token's slots and weights [S]; of those beyond the layers'
    own the ones alone in which something acts."""
    found: list[tuple[str, str | None, float]] = []
    for layer, slot, weight in zip(columns, slots.tolist(), weights.tolist(), strict=True):
        if slot >= 0:
            own, name = names[slot].split("/", 1)
            found.append((own, name, float(weight)))
        elif layer is not None:
            found.append((layer, None, 0.0))
    return found


@dataclass
class MoLoRAOutput(CausalLMOutputWithPast):
    """:class:`~transformers.modeling_outputs.CausalLMOutputWithPast` and the routes where they were asked for."""

    routes: Routes | None = None


class StreamedToken(NamedTuple):
    """One generated token. ``route``: the adapters that acted while it was produced."""

    token_id: int
    text: str
    route: list[tuple[str, str | None, float]]
