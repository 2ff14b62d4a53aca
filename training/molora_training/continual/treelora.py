"""TreeLoRA: in each module the adapter is drawn to the earlier task whose gradients are most like the new one's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from molora.adapter import WEIGHTS_FILE
from molora_training.checkpoint import save_tensors
from molora_training.continual.method import Method, first_rows, lora_layers, summed_loss, trainable
from molora_training.continual.tree import Bandit

ENTRIES = 1024  # of a module's gradient that are compared, spread evenly
TINY = 1e-5


class TreeLora(Method):
    """A tree of earlier tasks' gradients, and a bandit that finds in it which one is nearest (arXiv 2506.10355).

    A gradient is the mean over a task's examples, at the adapter that it began with. Before the first step each example
    of the new task is compared with one earlier task; of each module the nearest is then known, k. To the loss is added

        - strength * S / |S|,  S = sum over modules of <A, A_k>,

    |S| without gradient, so that A is drawn to what that task had learnt. That form of the term, the tree and the bound
    are those of the authors' code, which compares A itself while it learns, draws tasks at random by the bound, and
    multiplies the term by the loss and by the share of the epoch that is over: here the choice is made beforehand, and
    so a training that goes on from a checkpoint makes it again.

    The state holds A and ENTRIES of the gradient of each module for each of the last ``most`` tasks: about 6 MB a task
    for SmolLM2-135M and rank 16.
    """

    strength = 0.5
    most = 16

    def prepare(self, model: Any) -> None:
        parameters, self.layers = trainable(model), list(lora_layers(model))
        self.learnt = {name: parameters[_read(name)] for name in self.layers}
        rows, before = first_rows(self.task), self._before()
        model.eval()
        bandit = Bandit(before["gradients"].to(model.device), len(rows)) if before and rows else None
        total = torch.zeros(len(self.layers), ENTRIES, device=model.device)
        for row in rows:
            found = torch.autograd.grad(summed_loss(model, row), list(parameters.values()))
            one = thinned(dict(zip(parameters, found, strict=True)), self.layers)
            total += one
            if bandit is not None:
                bandit.see(one)
        self.gradient = total / max(1, len(rows))
        self.towards: dict[str, Tensor] = {}
        if bandit is not None:
            self.towards = {
                name: before[name][task].to(self.learnt[name])
                for name, task in zip(self.layers, bandit.nearest(), strict=True)
            }

    def penalty(self, model: Any, batch: Any) -> Tensor | None:
        if not self.towards:  # the first task has none before it
            return None
        return drawn([(self.learnt[name], towards) for name, towards in self.towards.items()], self.strength)

    def keep(self, version: Path) -> None:
        before, now = self._before(), load_file(version / WEIGHTS_FILE)
        kept = {"gradients": self.gradient.cpu()} | {name: now[f"{name}.lora_A.weight"] for name in self.layers}
        for name, tensor in kept.items():
            older = before[name] if before else tensor.new_zeros(0, *tensor.shape)
            kept[name] = torch.cat([older, tensor.unsqueeze(0).to(older)])[-self.most :]
        save_tensors(self.task.state, kept)

    def _before(self) -> dict[str, Tensor]:
        """What is known of earlier tasks; nothing of another shape of adapter."""
        found = load_file(self.task.state) if self.task.state.is_file() else {}
        shapes = {name: now.shape for name, now in self.learnt.items()}
        same = {name: tensor.shape[1:] for name, tensor in found.items() if name != "gradients"} == shapes
        return found if same else {}


def thinned(gradients: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    """Every so many-th entry of each module's gradient, first of A and then of B, so that at most ENTRIES are left.

    Args:
        gradients: of A and B, by PEFT's names of them. layers: of the modules.

    Returns:
        [modules, ENTRIES], float32; zeros fill up what a small module lacks.
    """
    found = torch.zeros(len(layers), ENTRIES, device=next(iter(gradients.values())).device)
    for row, layer in zip(found, layers, strict=True):
        flat = torch.cat([gradients[_read(layer)].flatten(), gradients[_written(layer)].flatten()])
        some = flat[:: -(-len(flat) // ENTRIES)]
        row[: len(some)] = some
    return found


def drawn(pairs: Sequence[tuple[Tensor, Tensor]], strength: float) -> Tensor:
    """-strength * S / |S|, S = sum of the products of pairs of tensors: its gradient is of the same size however large
    they are. |S| is without gradient.

    Returns:
        A scalar.
    """
    likeness = torch.stack([(one * other).sum() for one, other in pairs]).sum()
    return -strength * likeness / (likeness.detach().abs() + TINY)


def _read(layer: str) -> str:
    return f"{layer}.lora_A.default.weight"


def _written(layer: str) -> str:
    return f"{layer}.lora_B.default.weight"
