"""Ways for an adapter to learn something new and keep what it knew, behind one interface.

Each goes on from the version that serves and may hold it back while it learns. Replay is no way of its own: what is
remembered is learnt beside the new under any of them, and without a memory `plain` is sequential fine-tuning.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from molora_training.checkpoint import save_tensors
from molora_training.continual.inflora import InfLora
from molora_training.continual.method import Growing, Method, Task, first_rows, opened, summed_loss, trainable
from molora_training.continual.penalties import elastic, fisher, orthogonal
from molora_training.continual.sdlora import SDLora
from molora_training.continual.treelora import TreeLora
from molora_training.data import IGNORED, Batch
from molora_training.token_losses import TokenLosses

MethodName = Literal["plain", "elastic", "orthogonal", "distil", "inflora", "sd-lora", "treelora"]
EVERY = 4  # tokens, of which the first is distilled


class Elastic(Method):
    """Elastic weight consolidation (arXiv 1612.00796, equation 3): what mattered for tasks before moves little.

    The Fisher information of all tasks is one sum, in which each new task takes away a share of the older ones' weight
    (online, arXiv 1805.06370), so that it takes as much room as one.
    """

    strength = 400.0
    decay = 0.9

    def prepare(self, model: Any) -> None:
        self.parameters = trainable(model)
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()}
        before = self._before()
        self.importance = {name: f.to(self.anchor[name].device) for name, f in before.items()}

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        if not self.importance:  # of the first task nothing is known that came before
            return None
        return elastic(self.parameters, self.anchor, self.importance, self.strength)

    def keep(self, version: Path) -> None:
        model = opened(self.task, version)
        self.parameters = trainable(model)
        losses = [partial(summed_loss, model, row) for row in first_rows(self.task)]
        total, before = fisher(self.parameters, losses), self._before()
        save_tensors(
            self.task.state,
            {name: new + self.decay * before[name].to(new) if before else new for name, new in total.items()},
        )

    def _before(self) -> dict[str, torch.Tensor]:
        """The information of older tasks; none of another shape of adapter."""
        if not self.task.state.is_file():
            return {}
        found = load_file(self.task.state)
        shapes = {name: p.shape for name, p in self.parameters.items()}
        return found if {name: f.shape for name, f in found.items()} == shapes else {}


class Orthogonal(Growing):
    """New ranks for each task, which read what the older ones do not (O-LoRA, arXiv 2310.14152)."""

    strength = 0.5

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        self.new = {name: parameter for name, parameter in trainable(model).items() if ".lora_A." in name}
        self.old = {name: parameter.detach()[: self.older].clone() for name, parameter in self.new.items()}

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        now = {name: parameter[self.older :] for name, parameter in self.new.items()}
        return orthogonal(now, [self.old], self.strength)


class Distil(Method):
    """Learning without forgetting (arXiv 1606.09282): in the questions of the new text the adapter is to foretell what
    it foretold before. Nothing is kept for it."""

    strength = 1.0

    def prepare(self, model: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in trainable(model).items()}
        self.tokens = TokenLosses(model.get_base_model())

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        places = torch.arange(0, batch.input_ids.shape[1], EVERY, device=batch.input_ids.device)
        asked = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False,
            "logits_to_keep": places,
        }  # fmt: skip
        with torch.no_grad():
            taught = self.tokens.states(lambda: torch.func.functional_call(model, self.before, kwargs=asked))
        each = self.tokens.divergences(self.tokens.states(lambda: model(**asked)), taught)
        after = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)[:, places]
        counts = (after == IGNORED) & batch.attention_mask[:, places].bool()
        return self.strength * (each * counts).sum() / counts.sum().clamp_min(1)


METHODS: dict[str, Callable[[Task], Method]] = {
    "plain": Method, "elastic": Elastic, "orthogonal": Orthogonal, "distil": Distil, "inflora": InfLora,
    "sd-lora": SDLora, "treelora": TreeLora,
}  # fmt: skip
