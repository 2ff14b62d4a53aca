"""Which adapters write a text best, token by token: what a router can be taught beside its labels, or instead."""

from collections.abc import Iterable

import torch
from torch import nn

from molora import MoLoRAModel
from molora_training.data import IGNORED, Batch
from molora_training.selections import KeptSelections
from molora_training.token_losses import TokenLosses


class Teacher:
    """Each candidate of a layer, alone for the whole text. A layer whose adapters share a row has nothing to teach.

    Args:
        model: with the adapters; its router is not asked.
        layers: those that are taught.
    """

    def __init__(self, model: MoLoRAModel, layers: Iterable[str]) -> None:
        self.model = model
        self.token_losses = TokenLosses(model.base)
        off = dict.fromkeys(layer.name for layer in model.stack.layers)
        self.candidates = {
            layer: [KeptSelections(model, {**off, layer: name}) for name in (*model.stack[layer].adapters, None)]
            for layer in layers
            if model.stack[layer].routed
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """By layer [B, T, candidates] float32: how likely each token finds it that a candidate is the one to write the
        next token, of all equally likely ones (softmax of minus its loss there). Where the next is not to be written
        nothing is said: zeros."""
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        found = {}
        for layer, candidates in self.candidates.items():
            loss = torch.stack([self._losses(batch, labels, selection) for selection in candidates], -1)
            found[layer] = (-loss).softmax(-1) * (labels != IGNORED).unsqueeze(-1)
        return found

    def _losses(self, batch: Batch, labels: torch.Tensor, selection: KeptSelections) -> torch.Tensor:
        with self.model.routing.active(lambda: selection(len(labels))):
            return self.token_losses(
                lambda: self.model.base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False), labels
            )
