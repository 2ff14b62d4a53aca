"""Steps of a training whose batches are made by number: resumable, with curves; what validated best is kept."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from molora.errors import ConfigError, NonFiniteError
from molora_training.checkpoint import load_state, save_state, save_tensors
from molora_training.curves import curves
from molora_training.processes import Processes
from molora_training.schedule import warm_cosine

_CLIP_NORM = 1.0


@dataclass(frozen=True)
class LoopSettings:
    """steps: in all. warmup: share of the steps. checkpoint_every: steps, after which it is validated too."""

    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1:
            raise ConfigError("steps and checkpoint_every must be whole numbers from 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, not {self.learning_rate}.")


class Loop:
    """Trains ``parameters`` by AdamW.

    Args:
        loss: of a step, by its number: terms, "loss" among them. What it draws must depend on the number alone; of
            several processes each gives its part, and they add up.
        parameters: by name.
        validate: the figures that are kept at each checkpoint; every process gives those of all.
        chosen: the one of them that decides: in the end the parameters are those of the step where it was lowest.
        work: folder of the checkpoint and the curves.
        settings: how long and how fast.
        fingerprint: changes with anything that a checkpoint depends on.
        name: on the progress bar.
        processes: that do it together.
    """

    def __init__(
        self,
        loss: Callable[[int], Mapping[str, torch.Tensor]],
        parameters: Mapping[str, nn.Parameter],
        validate: Callable[[], dict[str, float]],
        chosen: str,
        work: Path,
        settings: LoopSettings,
        fingerprint: str,
        name: str,
        processes: Processes,
    ) -> None:
        self.loss, self.parameters, self.validate, self.chosen = loss, dict(parameters), validate, chosen
        self.work, self.settings, self.fingerprint, self.name = work, settings, fingerprint, name
        self.processes = processes
        self.state_file, self.best_file = work / "state.safetensors", work / "best.safetensors"
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], settings.learning_rate)

    def run(self, resume: bool = True, on_step: Callable[[int, float], None] | None = None) -> dict[str, Any]:
        """All steps that are left; the checkpoint stays until :meth:`done`.

        Returns:
            "step", "losses" of all steps, "validation": [[step, figures], ...] and "best": that of the step whose
            parameters there are.

        Raises:
            ConfigError: there is a checkpoint of another training. NonFiniteError: the loss or its gradient is not
                finite; the last checkpoint stays.
        """
        from tqdm.auto import tqdm

        main = self.processes.is_main
        if main and not resume:
            shutil.rmtree(self.work, ignore_errors=True)
        self.processes.wait()
        if self.state_file.is_file():
            counters = load_state(self.state_file, self.parameters, self.optimizer, self.fingerprint)
        else:
            counters = {"fingerprint": self.fingerprint, "step": 0, "losses": [], "validation": []}
        self.processes.same(self.parameters.values())
        first, total = counters["step"], self.settings.steps
        writer = curves(self.work / "tensorboard", first) if main else None
        with tqdm(total=total, initial=first, desc=self.name, disable=not main) as bar:
            for step in range(first, total):
                terms = self._step(step)
                counters["step"] = step + 1
                counters["losses"].append(terms["loss"])
                figures = {f"train/{name}": value for name, value in terms.items()}
                if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == total:
                    validation = self.validate()
                    counters["validation"].append([step + 1, validation])
                    self._save(counters)
                    figures |= {f"validation/{name}": value for name, value in validation.items()}
                    shown = ", ".join(f"{name} {value:.4f}" for name, value in validation.items())
                    bar.set_postfix_str(f"validation {shown}", refresh=False)
                if writer is not None:
                    for name, value in figures.items():
                        writer.add_scalar(name, value, step + 1)
                bar.update()
                if on_step is not None:
                    on_step(step + 1, terms["loss"])
        if writer is not None:
            writer.close()
        best = load_file(self.best_file)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])
        self.processes.wait()  # or one takes the checkpoint away before another has read it
        return {**counters, "best": self._best(counters)}

    def done(self) -> None:
        """The result is written: the checkpoints go."""
        if self.processes.is_main:
            self.state_file.unlink(missing_ok=True)
            self.best_file.unlink(missing_ok=True)
        self.processes.wait()

    def _save(self, counters: Mapping[str, Any]) -> None:
        if self.processes.is_main:
            if self._best(counters)[0] == counters["step"]:
                save_tensors(self.best_file, {n: p.detach() for n, p in self.parameters.items()})
            save_state(self.state_file, self.parameters, self.optimizer, counters)
        self.processes.wait()

    def _best(self, counters: Mapping[str, Any]) -> list[Any]:
        """The last of the validations that none is better than."""
        found: list[Any] = min(reversed(counters["validation"]), key=lambda one: one[1][self.chosen])
        return found

    def _step(self, step: int) -> dict[str, float]:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = warm_cosine(step, settings.steps, settings.warmup, settings.learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.loss(step)
        terms["loss"].backward()
        self.processes.sum_gradients(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP_NORM)
        whole = self.processes.total(torch.stack([value.detach().float() for value in terms.values()]))
        # The one wait of a step for the device.
        *found, size = torch.cat([whole, norm[None]]).tolist()
        means = dict(zip(terms, found, strict=True))
        if not (math.isfinite(means["loss"]) and math.isfinite(size)):
            raise NonFiniteError(
                f"The loss became {means['loss']} at step {step + 1}, its gradient {size}. The checkpoint before it "
                f"stays in {self.state_file}; take a lower learning_rate and start anew."
            )
        self.optimizer.step()
        return means
