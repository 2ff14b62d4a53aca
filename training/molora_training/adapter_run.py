"""The training loop of one adapter: steps, validation, checkpoints, and what comes out."""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from molora.errors import NonFiniteError
from molora_training.adapter_output import settings_record, write_adapter
from molora_training.adapter_settings import AdapterTrainSettings
from molora_training.batches import plan_pass, rounded
from molora_training.captured import CapturedSteps, worth_capturing
from molora_training.checkpoint import load_state, save_state, save_tensors
from molora_training.curves import curves
from molora_training.data import IGNORED, Batch, Encoded, collate
from molora_training.processes import Processes
from molora_training.schedule import warm_cosine
from molora_training.start_dropout import StartDropout
from molora_training.token_losses import TokenLosses

CPU_TOKENS = 1024  # padded; each takes 1.5 MB between a forward and its way back (SmolLM2-135M)
_CLIP_NORM = 1.0


class Hold(Protocol):
    """What holds an adapter back while it learns; it must not wait for the device."""

    def prepare(self, model: Any) -> None:
        """Sees PEFT's model before the first step, and may freeze a part of the adapter."""

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        """What is added to the mean loss of a step; a scalar."""


@dataclass
class Run:
    """One training: model, data, plan, counters, and what this process does of it."""

    settings: AdapterTrainSettings
    processes: Processes
    model: Any
    rows: Sequence[Encoded]
    held_out: Sequence[Encoded]
    steps: Sequence[Sequence[int]]  # of each, the indices of rows, which the processes share
    pad_id: int
    capturable: bool = False  # nothing in the model waits for the device
    hold: Hold | None = None
    counters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start_dropout = StartDropout(self.model, self.settings.lora.start_dropout)
        self.token_losses = TokenLosses(getattr(self.model, "peft", self.model).get_base_model())
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.settings.learning_rate, weight_decay=0.0)
        self.state_file = self.settings.work / "state.safetensors"
        self.best_file = self.settings.work / "best.safetensors"
        self.is_main = self.processes.is_main
        alone = self.processes.device.type == "cuda" and self.processes.count == 1
        self.captured: CapturedSteps | None = None
        if self.capturable and alone and self.settings.lora.dropout == 0:
            plan = [[self.rows[i].input_ids.numel() for i in indices] for indices in self.steps]
            size = self.settings.batch_tokens
            self.captured = CapturedSteps(_Mean(self), self.parameters.values(), size, worth_capturing(plan, size))

    def start(self, resume: bool) -> None:
        """Restore the checkpoint, or measure what it begins with and write the first one."""
        fingerprint = self._fingerprint()
        if self.is_main and not resume:
            shutil.rmtree(self.settings.work, ignore_errors=True)
        self.processes.wait()
        self.processes.same(self.parameters.values())
        if self.state_file.is_file():
            self.counters = load_state(self.state_file, self.parameters, self.optimizer, fingerprint)
            return
        base_loss = self._validate()
        self.counters = {
            "fingerprint": fingerprint,
            "step": 0,
            "best_step": 0,
            "base_validation_loss": base_loss,
            "validation_loss": base_loss,
            "validation_losses": [[0, base_loss]],
            "train_losses": [],
        }
        self._save(is_best=True)

    def train(self, on_step: Callable[[int, float], None] | None) -> None:
        """All steps that are left."""
        from tqdm.auto import tqdm

        first, total = self.counters["step"], len(self.steps)
        writer = curves(self.settings.work / "tensorboard", first) if self.is_main else None
        name = self.settings.out.name
        with tqdm(total=total, initial=first, desc=f"adapter {name}", disable=not self.is_main) as bar:
            for step in range(first, total):
                loss, norm = self._step(step)
                self.counters["step"] = step + 1
                self.counters["train_losses"].append(loss)
                if writer is not None:
                    writer.add_scalar("train/loss", loss, step + 1)
                    writer.add_scalar("train/gradient_norm", norm, step + 1)
                    writer.add_scalar("train/learning_rate", self._learning_rate(step), step + 1)
                if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == total:
                    validation_loss = self._checkpoint()
                    if writer is not None:
                        writer.add_scalar("validation/loss", validation_loss, step + 1)
                best = self.counters["validation_loss"]
                bar.set_postfix_str(f"loss {loss:.3f}, best validation {best:.3f}", refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(step + 1, loss)
        if writer is not None:
            writer.close()

    def finish(self, seconds: float, command: str | None) -> dict[str, Any]:
        """Write the best adapter and remove the checkpoint; the curves stay."""
        self.captured = None  # which holds this, and with it the model and its graphs on a GPU
        best = load_file(self.best_file)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])
        if self.is_main and self.counters["best_step"] == 0:
            before = "the base" if self.settings.start is None else "the adapter that it went on from"
            print(f"No step did better than {before}: the adapter that is written changes nothing.", file=sys.stderr)
        device = self.processes.device
        losses = self.counters["train_losses"]
        metrics = {
            "base_validation_loss": self.counters["base_validation_loss"],
            "validation_loss": self.counters["validation_loss"],
            "best_step": self.counters["best_step"],
            "train_loss": losses[-1],
            "steps": len(self.steps),
            "train_examples": len(self.rows),
            "validation_examples": len(self.held_out),
            "answer_tokens": sum(self._answer_tokens(step) for step in range(len(self.steps))),
            "validation_losses": self.counters["validation_losses"],
            "train_losses": losses,
            "seconds": round(seconds, 1),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            "processes": self.processes.count,
            "parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "settings": settings_record(self.settings),
        }
        if self.is_main:
            write_adapter(getattr(self.model, "peft", self.model), self.settings, metrics, command)
            self.state_file.unlink()
            self.best_file.unlink()
        self.processes.wait()
        return metrics

    def _step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns the loss over all processes and the gradient's norm before clipping."""
        # Dropout depends on the step and the process alone, so a resumed training draws the same.
        torch.manual_seed(self.settings.seed * 1_000_003 + step * self.processes.count + self.processes.rank)
        self.model.train()
        indices = self.processes.own(self.steps[step])
        count = self._answer_tokens(step)  # of all processes: each answer token of the step weighs the same
        if self.captured is not None:
            total = self.captured(self._batch(self.rows, indices))["mean"] * count
        else:
            total = self._learn(indices, count)
        self.processes.sum_gradients(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP_NORM))
        mean = float(self.processes.total(total)) / count
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise NonFiniteError(
                f"The loss became {mean} and the gradient's norm {norm} at step {step + 1}. The adapter of step "
                f"{self.counters['best_step']} stays in {self.best_file}; take a lower learning_rate and start anew."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.step()
        return mean, norm

    def _learn(self, indices: Sequence[int], count: int) -> torch.Tensor:
        """Gradients of rows of a step with so many answer tokens; gives the rows' summed loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.processes.device)
        if not indices:  # the step has fewer rows than there are processes
            return total
        batch = self._batch(self.rows, indices)
        *first, last = self._parts(indices)
        for part in first:
            loss = self.summed_loss(self.model, self._batch(self.rows, part))
            (loss * (1 / count)).backward()
            total += loss.detach()
        loss = self.summed_loss(self.model, self._batch(self.rows, last) if first else batch)
        penalty = self.hold.penalty(self.model, batch) if self.hold is not None else None
        (loss * (1 / count) + (0.0 if penalty is None else penalty / self.processes.count)).backward()
        return total + loss.detach()

    def _parts(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Of a batch, what goes forward and back at a time: on a CPU less, which is as fast and takes less memory."""
        if self.processes.device.type != "cpu":
            return [indices]
        size = max(1, CPU_TOKENS // rounded(max(self.rows[index].input_ids.numel() for index in indices)))
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _batch(self, rows: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        return collate([rows[index] for index in indices], self.pad_id).to(self.processes.device)

    def summed_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the answer tokens of a batch, float32, shape []."""
        self.start_dropout.see(batch)
        kind = self.processes.device.type
        mixed = kind == "cuda" and self.settings.dtype == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            return self.token_losses(
                lambda: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False),
                torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED),
            ).sum()

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss for each answer token of the validation examples, over all processes."""
        self.model.eval()
        batches = plan_pass([row.input_ids.numel() for row in self.held_out], self.settings.batch_tokens)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for indices in self.processes.own(batches):
            total += self.summed_loss(self.model, self._batch(self.held_out, indices))
        count = sum(answer_count(row) for row in self.held_out)
        return float(self.processes.total(total)) / count

    def _checkpoint(self) -> float:
        validation_loss = self._validate()
        step = self.counters["step"]
        if not math.isfinite(validation_loss):
            raise NonFiniteError(
                f"The validation loss became {validation_loss} at step {step}. The adapter of step "
                f"{self.counters['best_step']} stays in {self.best_file}; take a lower learning_rate and start anew."
            )
        self.counters["validation_losses"].append([step, validation_loss])
        is_best = validation_loss < self.counters["validation_loss"]
        if is_best:
            self.counters |= {"validation_loss": validation_loss, "best_step": step}
        self._save(is_best)
        return validation_loss

    def _save(self, is_best: bool) -> None:
        if self.is_main:
            if is_best:
                save_tensors(self.best_file, self.parameters)
            save_state(self.state_file, self.parameters, self.optimizer, self.counters)
        self.processes.wait()

    def _answer_tokens(self, step: int) -> int:
        return sum(answer_count(self.rows[index]) for index in self.steps[step])

    def _learning_rate(self, step: int) -> float:
        return warm_cosine(step, len(self.steps), self.settings.warmup, self.settings.learning_rate)

    def _fingerprint(self) -> str:
        """Changes with anything that a checkpoint depends on."""
        settings, digest = self.settings, hashlib.sha256()
        record = settings_record(settings) | {"out": str(settings.out)}
        digest.update(json.dumps(record, sort_keys=True).encode())
        files = [settings.data.train, settings.data.validation]
        for folder in (settings.start, settings.stack):
            if folder is not None:
                files += [file for file in sorted(folder.rglob("*")) if file.suffix in (".json", ".safetensors")]
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


class _Mean(torch.nn.Module):
    """The mean over a batch's answer tokens, without asking the device how many there are."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        mean = self.run.summed_loss(self.run.model, batch) / (batch.labels[:, 1:] != IGNORED).sum()
        hold = self.run.hold
        penalty = hold.penalty(self.run.model, batch) if hold is not None else None
        return {"mean": mean, "loss": mean if penalty is None else mean + penalty}


def answer_count(row: Encoded) -> int:
    """How many tokens of `row` are learnt: those with a label that some earlier token predicts."""
    return int((row.labels[1:] != IGNORED).sum())
