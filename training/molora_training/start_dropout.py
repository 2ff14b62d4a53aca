"""An adapter learns to do without itself at the start of a text, where no router can know that it is right."""

from typing import Any

import torch
from torch import nn


class StartDropout:
    """While ``model`` trains, its LoRA adapter does not act at the first tokens of every other example of a batch: so
    it comes to serve both where it acts alone and where the first tokens are the base's.

    Args:
        model: PEFT's; called with ``input_ids`` [B, T].
        tokens: from 1 to how many; an example and its place in the batch say how many, so that a resumed training and
            a captured one do the same. 0: the adapter acts everywhere.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.acts: torch.Tensor | None = None  # [B, T, 1]
        if tokens:
            model.register_forward_pre_hook(self._see, with_kwargs=True)
            for name, module in model.named_modules():
                if ".lora_A." in name:
                    module.register_forward_hook(self._cut)

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        row, place = (torch.arange(size, device=ids.device) for size in ids.shape)
        without = torch.where(row % 2 == 1, 1 + (ids.sum(1) + row // 2) % self.tokens, 0)
        self.acts = (place >= without.unsqueeze(1)).unsqueeze(2)

    def _cut(self, module: nn.Module, _: Any, shrunk: torch.Tensor) -> torch.Tensor:
        return shrunk * self.acts if module.training and self.acts is not None else shrunk
