"""InfLoRA: new ranks that read what the new task's inputs have outside the older tasks' ones."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from molora_training.checkpoint import save_tensors
from molora_training.continual.method import Growing, first_rows, opened, trainable
from molora_training.continual.subspaces import Reads, directions, grown


class InfLora(Growing):
    """Interference-free LoRA (arXiv 2404.00228), as its authors' code has it.

    Of each module A's new rows are U^T / sqrt(3), U the leading left singular vectors of (I - M M^T) C: C is the
    covariance of what the module reads in the new task, M an orthonormal basis of what it read in older ones. They are
    fixed; only the new columns of B learn, so nothing changes where older tasks' inputs lie. After the task M grows
    until it holds ``share`` of the energy of C. (The authors let the share rise to 1 over a number of tasks, which is
    not known here, and keep the complement of M once M is wider than half of the inputs, which it never is here.)

    The state is M of each module, once for those that read the same: 4 bytes * ``directions`` * the width of all that
    is read, at most 25 MB for SmolLM2-135M.
    """

    share = 0.98
    directions = 64  # of older tasks' inputs at most, and never more than half of the module's

    def prepare(self, model: Any) -> None:
        super().prepare(model)
        reads, before = Reads(model, first_rows(self.task)), self._before()
        made = {
            name: directions(covariance, _basis(before, name, covariance), self.ranks) / math.sqrt(3)
            for name, covariance in reads.covariances.items()
        }
        for name, parameter in trainable(model).items():
            module, is_read, _ = name.partition(".lora_A.")
            if not is_read:
                continue
            # Not frozen but without a gradient: a checkpoint holds what learns, and B is worth nothing with another A.
            parameter.register_hook(torch.zeros_like)
            if module in reads.first:  # nothing was read if all examples are too long
                with torch.no_grad():
                    parameter[self.older :] = made[reads.first[module]].to(parameter)

    def keep(self, version: Path) -> None:
        reads, before = Reads(opened(self.task, version), first_rows(self.task)), self._before()
        now = {
            name: grown(
                _basis(before, name, covariance), covariance, self.share, min(self.directions, len(covariance) // 2)
            )
            for name, covariance in reads.covariances.items()
        }
        save_tensors(self.task.state, {**before, **now})

    def _before(self) -> dict[str, torch.Tensor]:
        return load_file(self.task.state) if self.task.state.is_file() else {}


def _basis(before: dict[str, torch.Tensor], name: str, covariance: torch.Tensor) -> torch.Tensor:
    """M of a module; without columns if there is none of its width."""
    found = before.get(name)
    if found is None or len(found) != len(covariance):
        return covariance.new_zeros(len(covariance), 0)
    return found.to(covariance)
