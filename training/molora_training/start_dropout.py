"""An adapter learns to do without itself at the start of a question, where no router can know that it is right."""

from typing import Any

import torch
from torch import nn

from molora_training.data import IGNORED, Batch


class StartDropout:
    """While ``model`` trains, its LoRA adapter does not act at the first tokens of every other example of a batch: so
    it comes to serve both where it acts alone and where the base, or another adapter, has read the question.

    Args:
        model: PEFT's.
        tokens: from 1 to how many, and never one that predicts a token of an answer; an example and its place in the
            batch say how many, so that a resumed training and a captured one do the same. 0: the adapter acts
            everywhere.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.tokens = tokens
        self.acts: torch.Tensor | None = None  # [B, T, 1]
        if tokens:
            for name, module in model.named_modules():
                if ".lora_A." in name:
                    module.register_forward_hook(self._cut)

    def see(self, batch: Batch) -> None:
        """Before each forward: what the model is about to be called with."""
        if not self.tokens:
            return
        ids, answered = batch.input_ids, batch.labels != IGNORED
        row, place = (torch.arange(size, device=ids.device) for size in ids.shape)
        question = torch.where(answered, place, ids.shape[1]).amin(1) - 1  # the last one predicts the answer's first
        most = question.clamp(1, self.tokens)
        without = torch.where(row % 2 == 1, 1 + (ids.sum(1) + row // 2) % most, 0)
        self.acts = (place >= without.unsqueeze(1)).unsqueeze(2)

    def _cut(self, module: nn.Module, _: Any, shrunk: torch.Tensor) -> torch.Tensor:
        return shrunk * self.acts if module.training and self.acts is not None else shrunk
