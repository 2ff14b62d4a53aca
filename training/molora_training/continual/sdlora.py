"""SD-LoRA: older tasks' directions stay, and how much each of them counts goes on learning."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from molora.adapter import WEIGHTS_FILE, Adapter
from molora_training.checkpoint import save_tensors
from molora_training.continual.method import Growing, lora_layers

MAGNITUDES = "magnitudes"


class SDLora(Growing):
    """Decoupled LoRA (arXiv 2501.13198), as its authors' code has it: of each module

        delta = fixed + sum over older tasks i of alpha_i B_i A_i / (|B_i| |A_i|) + alpha_t s B_t A_t

    with Frobenius norms, s the adapter's scale, and all alpha 0.8 at the start of each task. B_t, A_t and all alpha
    learn; so a task begins with the older ones scaled, which it may undo. Every module has its own alpha (in the
    authors' code all share them). ``fixed`` are the ranks that the adapter had before the first task, or after it was
    cut: to the method they are weights of the base.

    While it learns, what A gives is multiplied, rank by rank; what is written is an ordinary adapter with that in B.
    The state is how many ranks each task has.
    """

    begin = 0.8

    def start(self, served: Path, work: Path) -> Path:
        wider = super().start(served, work)
        known = load_file(self.task.state)["ranks"].tolist() if self.task.state.is_file() else []
        # Of another adapter, or of one that another method went on with, nothing is known.
        self.blocks: list[int] = known if sum(known) == self.older else [self.older]
        return wider

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        self.factors: dict[str, Factors] = {}
        for name, layer in lora_layers(model).items():
            a, b = layer.lora_A["default"], layer.lora_B["default"].weight
            shares = shares_of(a.weight.detach(), b.detach(), self.blocks, layer.scaling["default"])
            # A parameter of the module: it is optimized, and in the checkpoints, like any other of the adapter.
            a.register_parameter(MAGNITUDES, nn.Parameter(shares.new_full((len(shares),), self.begin)))
            self.factors[name] = factors = Factors(a.magnitudes, shares, self.blocks[0])
            a.register_forward_hook(partial(_weigh, factors))

    def finish(self, trained: Path, work: Path) -> Path:
        shutil.copytree(trained, work / "folded")
        tensors = load_file(trained / WEIGHTS_FILE)
        for name, factors in self.factors.items():
            del tensors[f"{name}.lora_A.{MAGNITUDES}"]
            b = tensors[f"{name}.lora_B.weight"]
            tensors[f"{name}.lora_B.weight"] = (b.float() * factors().detach().to(b.device)).to(b)
        save_tensors(work / "folded" / WEIGHTS_FILE, tensors, {"format": "pt"})
        return super().finish(work / "folded", work)

    def keep(self, version: Path) -> None:
        blocks, rank = [*self.blocks, self.ranks], Adapter.load(version).ranks[0]
        save_tensors(self.task.state, {"ranks": torch.tensor(blocks if sum(blocks) == rank else [rank])})


class Factors:
    """By what each rank of a module is multiplied. magnitudes: alpha of each task [tasks]. shares: of each task what a
    rank is multiplied by for an alpha of 1 [tasks, rank]. fixed: how many first ranks are not multiplied."""

    def __init__(self, magnitudes: Tensor, shares: Tensor, fixed: int) -> None:
        self.magnitudes, self.shares = magnitudes, shares
        self.ones = torch.zeros_like(shares[0])
        self.ones[:fixed] = 1

    def __call__(self) -> Tensor:
        """[rank], float32."""
        return self.ones + (self.magnitudes.unsqueeze(1) * self.shares).sum(0)


def shares_of(a: Tensor, b: Tensor, blocks: list[int], scale: float) -> Tensor:
    """1 / (scale |B_i| |A_i|) at the ranks of each older task i, and 1 at those of the newest.

    Args:
        a: A [rank, in]. b: B [out, rank].
        blocks: how many ranks were there before, and how many each older task has; the others are the newest's.
        scale: of the adapter.

    Returns:
        [tasks, rank], float32; 0 for a task that learnt nothing.
    """
    shares, end = a.new_zeros(len(blocks), len(a)), blocks[0]
    for task, ranks in enumerate(blocks[1:]):
        norm = scale * b[:, end : end + ranks].norm() * a[end : end + ranks].norm()
        shares[task, end : end + ranks] = torch.where(norm > 0, 1 / norm, 0)
        end += ranks
    shares[-1, end:] = 1
    return shares


def _weigh(factors: Factors, module: nn.Module, _: Any, shrunk: Tensor) -> Tensor:
    return shrunk * factors()
