"""Train the router of a stack whose adapters and base stay frozen.

- conversations that change their domain from question to question, mixed from the training examples anew for each
  epoch, and single ones
- cross-entropy of each token to its domain; next-token loss through the chosen adapters (straight-through), in which
  each domain's answers weigh the same; balance, z
- where only labels are learnt, nothing above the layers that the router reads is computed
- resumable; `accelerate launch` for several processes, each with its part of every step; curves for TensorBoard
- on GPUs forward and backward are CUDA graphs, one for each shape of batch
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora import MoLoRAModel, Router, Stack
from molora.base import DEFAULT_BASE
from molora.errors import ConfigError, DataError, NonFiniteError
from molora.router import NEVER, SAMPLES
from molora.saved import ROUTER_METRICS
from molora.selection import router_rows
from molora.stack import AUTO
from molora_training.attention import attend_causally
from molora_training.batches import plan_pass, plan_steps, rounded
from molora_training.captured import CapturedSteps
from molora_training.checkpoint import load_state, save_state
from molora_training.curves import curves
from molora_training.data import (
    IGNORED,
    KINDS,
    Batch,
    Encoded,
    Example,
    Split,
    both_file,
    collate,
    encode_within,
    mix_all_ways,
    read_examples,
    read_mixed,
)
from molora_training.processes import Processes
from molora_training.router_objective import Labels, RouterHold, RouterObjective, reading_inputs
from molora_training.router_settings import RouterTrainSettings
from molora_training.schedule import warm_cosine

GENERAL = "general"
_VALIDATION_MIXED = 200
_STATISTICS_BATCHES = 32
_SEEDS_APART = 1000  # of two epochs: what they mix is not the same


def train(
    settings: RouterTrainSettings,
    resume: bool = True,
    command: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
    hold: RouterHold | None = None,
) -> dict[str, Any]:
    """Trains and writes a saved MoLoRA to ``settings.out``; checkpoints and curves lie in ``settings.work``.

    Args:
        settings: what to train.
        resume: go on from the checkpoint of the same settings if there is one.
        command: the command line to name in the router's card.
        on_step: called after each step with the number of finished steps and the loss.
        hold: what holds the router back while it learns.

    Returns:
        The metrics of ``router.metrics.json``.

    Raises:
        ConfigError: settings that do not fit. DataError: data that is missing or does not fit the stack.
        NonFiniteError: the loss is not finite; the last checkpoint stays.
    """
    processes = Processes()
    started = time.monotonic()
    with processes.main_first():
        model = load_model(settings, processes.device)
    domains, epochs, held_out = _data(settings, model)
    run = _Run(settings, processes, model, domains, epochs, held_out, hold)
    run.start(resume)
    run.train(on_step)
    return run.finish(time.monotonic() - started, command)


def load_model(settings: RouterTrainSettings, device: torch.device) -> MoLoRAModel:
    """The frozen model with the router that is to be trained."""
    dtype = getattr(torch, settings.dtype)
    if settings.model.is_dir():
        model = MoLoRAModel.from_pretrained(settings.model, base=settings.base, dtype=dtype)
    else:
        model = MoLoRAModel.from_base(settings.base or DEFAULT_BASE, Stack.load(settings.model), dtype=dtype)
    model.to(device)
    if settings.start == "saved":
        if not isinstance(model.router, Router):
            raise ConfigError(f"start is 'saved', and {settings.model} has no learned router.")
        model.router.requires_grad_(True)
    else:
        torch.manual_seed(settings.seed)
        rows, hidden = router_rows(model.stack), model.config.get_text_config().hidden_size
        model.set_router(Router(settings.router, rows, hidden))
    return model


def _data(settings: RouterTrainSettings, model: MoLoRAModel) -> tuple[list[str], list[list[Encoded]], list[Encoded]]:
    """Names of the domains, training conversations by epoch, and those for validation."""
    # A layer that is off unless it is named (how to speak) is a choice of the person, which no text foretells.
    layers = [layer for layer in model.stack.layers if not layer.keyed and (layer.default == AUTO or layer.shared)]
    known = [n for layer in layers for n in layer.adapters]
    domains = [n for n in dict.fromkeys([*known, GENERAL]) if (settings.data / f"{n}.train.jsonl").is_file()]
    if not set(domains) - {GENERAL}:
        raise DataError(
            f"{settings.data} holds no <adapter>.train.jsonl for any of {', '.join(known)}; "
            f"make it with `molora train data`."
        )

    counts = (settings.mixed, settings.documents, settings.in_a_turn, settings.asides)

    def examples_of(split: Split) -> dict[str, Sequence[Example]]:
        return {domain: _some(settings.data / f"{domain}.{split}.jsonl", domains) for domain in domains}

    def encoded(
        examples: dict[str, Sequence[Example]], split: Split, counts: Sequence[int], both: int, epoch: int = 0
    ) -> list[Encoded]:
        mixed: list[Any] = []
        if len(domains) > 1:
            mixed += mix_all_ways(examples, split, counts, settings.seed + _SEEDS_APART * epoch)
        for kind, needed in KINDS.items() if both else ():
            if not set(needed) <= set(domains):
                raise DataError(f"Questions of '{kind}' need adapters for {' and '.join(needed)}: set both to 0.")
            mixed += read_mixed(settings.data / both_file(kind, split))[:both]
        share = max(1, counts[0] // 8)
        singles = [example for rows in examples.values() for example in _turn(rows, share, epoch)]
        return encode_within([*mixed, *singles], model.tokenizer, settings.max_length, domains)

    train = examples_of("train")
    epochs = [encoded(train, "train", counts, settings.both, epoch) for epoch in range(settings.epochs)]
    few = [min(count, _VALIDATION_MIXED) for count in counts]
    held_out = encoded(examples_of("validation"), "validation", few, min(settings.both, _VALIDATION_MIXED))
    return domains, epochs, held_out


def _some(file: Path, domains: Sequence[str]) -> list[Example]:
    rows = read_examples(file)
    if not rows:
        raise DataError(f"{file} holds no example: fill it, or take the domain's files away.")
    for row in rows:
        if row.domain not in domains:
            raise DataError(f"{file}: example {row.id!r} is of domain {row.domain!r}, not of {', '.join(domains)}.")
    return rows


def _turn(rows: Sequence[Example], share: int, epoch: int) -> list[Example]:
    """An epoch's share of the examples, which go round."""
    first = share * epoch % len(rows)
    return [*rows[first:], *rows[:first]][:share]


def answer_weights(rows: Sequence[Encoded], domains: int) -> torch.Tensor:
    """[domains]: with which the answers of each domain in ``rows`` weigh the same, whatever their length; 0 for one
    without an answer."""
    tokens = torch.zeros(domains)
    for row in rows:
        tokens += torch.bincount(row.domain_ids[row.labels != IGNORED], minlength=domains)
    return torch.where(tokens > 0, tokens.sum() / tokens.clamp_min(1), 0.0) / domains


class _Run:
    """One training: what this process does of it."""

    def __init__(
        self,
        settings: RouterTrainSettings,
        processes: Processes,
        model: MoLoRAModel,
        domains: list[str],
        epochs: list[list[Encoded]],
        held_out: list[Encoded],
        hold: RouterHold | None = None,
    ) -> None:
        self.hold = hold
        self.settings, self.processes, self.model = settings, processes, model
        self.rows, self.held_out = [row for rows in epochs for row in rows], held_out
        self.labels = Labels(model, domains)
        router: Any = model.router
        self.router = router
        if hold is not None:
            hold.prepare(router)
        weights, answers = self._class_weights(), answer_weights(self.rows, len(domains))
        self.objective = RouterObjective(
            model.train(), self.labels, settings.loss, weights, settings.starts, answers, hold, processes
        )
        self.parameters: dict[str, Any] = {n: p for n, p in router.named_parameters() if p.requires_grad}
        unmasked = attend_causally(model.base, rounded(settings.max_length))
        # The balance over several processes asks them in the middle of a forward, which a graph cannot.
        apart = processes.count == 1 or not settings.loss.balance
        self.captured: CapturedSteps | None = None
        if unmasked and apart and processes.device.type == "cuda":
            size = settings.batch_tokens // processes.count
            self.captured = CapturedSteps(self.objective, self.parameters.values(), size)
        matrices = [parameter for parameter in self.parameters.values() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters.values() if parameter.dim() <= 1]
        decay = 0.0 if hold is not None else settings.weight_decay  # it would move what is held, too
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
            settings.learning_rate,
        )
        self.steps = self._planned(epochs)[: settings.max_steps]
        self.state_file = settings.work / "state.safetensors"
        self.counters: dict[str, Any] = {}

    def _planned(self, epochs: list[list[Encoded]]) -> list[list[int]]:
        """Of each step the rows, which the processes share."""
        steps: list[list[int]] = []
        first, settings = 0, self.settings
        for number, rows in enumerate(epochs):
            lengths = [row.input_ids.numel() for row in rows]
            own = plan_steps(lengths, settings.batch_tokens, 1, settings.seed + _SEEDS_APART * number)
            steps += [[first + index for index in batch] for batch in own]
            first += len(rows)
        return steps

    def start(self, resume: bool) -> None:
        if self.processes.is_main and not resume:
            shutil.rmtree(self.settings.work, ignore_errors=True)
        self.processes.wait()
        if self.settings.start == "new":
            self._standardise()
            self._silence_untaught()
        fingerprint = self._fingerprint()
        if self.state_file.is_file():
            self.counters = load_state(self.state_file, self.parameters, self.optimizer, fingerprint)
        else:
            self.counters = {"fingerprint": fingerprint, "step": 0, "losses": [], "validation": []}
        self.processes.same([*self.router.parameters(), *self.router.buffers()])

    def train(self, on_step: Callable[[int, float], None] | None) -> None:
        from tqdm.auto import tqdm

        first, total = self.counters["step"], len(self.steps)
        main = self.processes.is_main
        writer = curves(self.settings.work / "tensorboard", first) if main else None
        with tqdm(total=total, initial=first, desc="router", disable=not main) as bar:
            for step in range(first, total):
                terms = self._step(step)
                self.counters["step"] = step + 1
                self.counters["losses"].append(terms["loss"])
                if writer is not None:
                    for name, value in terms.items():
                        writer.add_scalar(f"train/{name}", value, step + 1)
                if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == total:
                    validation = self._validate()
                    self.counters["validation"].append([step + 1, validation])
                    self._save()
                    if writer is not None:
                        for name, value in validation.items():
                            writer.add_scalar(f"validation/{name}", value, step + 1)
                    bar.set_postfix_str(f"validation loss {validation['loss']:.4f}", refresh=False)
                bar.update()
                if on_step is not None:
                    on_step(step + 1, terms["loss"])
        if writer is not None:
            writer.close()

    def finish(self, seconds: float, command: str | None) -> dict[str, Any]:
        metrics = {
            "validation": self.counters["validation"][-1][1],
            "train_losses": self.counters["losses"],
            "steps": len(self.steps),
            "train_conversations": len(self.rows),
            "validation_conversations": len(self.held_out),
            "domains": self.labels.domains,
            "parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "seconds": round(seconds, 1),
            "machine": _machine(self.processes.device),
            "processes": self.processes.count,
            "command": command,
            # Paths mean nothing elsewhere; names do.
            "settings": json.loads(
                json.dumps(
                    asdict(self.settings) | {"null_start": self.settings.starts}, default=lambda value: value.name
                )
            ),
        }
        if self.processes.is_main:
            self.model.eval()
            self._keep_samples()
            self.model.save_pretrained(self.settings.out)
            partial = self.settings.out / f".{ROUTER_METRICS}"
            partial.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.settings.out / ROUTER_METRICS)
            self.state_file.unlink(missing_ok=True)
        self.processes.wait()
        return metrics

    def _step(self, step: int) -> dict[str, float]:
        rate = warm_cosine(step, len(self.steps), self.settings.warmup, self.settings.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        indices = self.steps[step]
        own = self.processes.own(indices)
        batch = self._batch(own or indices[:1])  # where there is none for this process, it does one that counts nothing
        if (shares := self.objective.shares) is not None:
            shares.see(self.objective.sizes(batch) * bool(own))
        if self.captured is not None:
            terms = self.captured(batch)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            terms = self.objective(batch)
            terms["loss"].backward()
        self.processes.sum_gradients(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        # The one wait of a step for the device.
        found = self.processes.total(torch.stack([v.detach().float() for v in terms.values()])).tolist()
        means = dict(zip(terms, found, strict=True))
        if not (math.isfinite(means["loss"]) and math.isfinite(float(norm))):
            raise NonFiniteError(
                f"The loss became {means['loss']} at step {step + 1}. The checkpoint before it stays in "
                f"{self.state_file}; take a lower learning_rate and start anew."
            )
        self.optimizer.step()
        return means

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Means over the validation batches, weighted by tokens; each process does some of them."""
        sums: dict[str, float] = {}
        self.model.eval()
        self.router.train()  # its logits are wanted also where the selection forces
        if (shares := self.objective.shares) is not None:
            shares.parts = False
        plan = plan_pass([row.input_ids.numel() for row in self.held_out], self.settings.batch_tokens)
        for indices in self.processes.own(plan):
            batch = collate([self.held_out[index] for index in indices], self._pad).to(self.processes.device)
            count = int(batch.attention_mask.sum())
            for name, value in self.objective(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
        if shares is not None:
            shares.parts = True
        self.model.train()
        total = sum(row.input_ids.numel() for row in self.held_out)
        return {name: value / total for name, value in self.processes.figures(sums).items()}

    @torch.no_grad()
    def _standardise(self) -> None:
        """Mean and deviation of what each part reads, over the first training batches."""
        for index, part in enumerate(self.router.parts):
            seen = []
            for indices in self.steps[:_STATISTICS_BATCHES]:
                batch = self._batch(indices)
                x = reading_inputs(self.model, batch, self.objective.selection(len(batch.input_ids)))[index]
                seen.append(x[batch.attention_mask.bool()].float())
            everything = torch.cat(seen)
            part.mean.copy_(everything.mean(0))
            part.std.copy_(everything.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def _silence_untaught(self) -> None:
        """Rows that get no labels and no gradient: "auto" leaves their adapters out."""
        taught = {row for rows in self.labels.rows.values() for row in rows}
        for part in self.router.parts:
            for index, name in enumerate(self.router.rows):
                if index not in taught:
                    part.output.weight[index] = 0
                    part.output.bias[index] = 0 if name.endswith("/none") else NEVER

    @torch.no_grad()
    def _keep_samples(self) -> None:
        """Features of some training tokens of every row, for rows that are added later."""
        seen: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        for indices in self.steps[:_STATISTICS_BATCHES]:
            batch = self._batch(indices)
            real = batch.attention_mask.bool()
            inputs = reading_inputs(self.model, batch, self.objective.selection(len(batch.input_ids)))
            q = [
                part.features(part.read(x), real, None)[real] for part, x in zip(self.router.parts, inputs, strict=True)
            ]
            start = (torch.arange(real.shape[1], device=real.device) < self.settings.starts).expand_as(real)
            seen.append((q, torch.stack([batch.domain_ids[real], start[real]])))
        domains, starts = torch.cat([of for _, of in seen], 1)
        chance = torch.Generator().manual_seed(self.settings.seed)
        chosen, rows = [], []
        for layer, own in self.labels.rows.items():
            row = torch.tensor(own)[self.labels.targets[layer]].to(domains.device)[domains]  # of each token
            row[starts.bool()] = own[-1]
            for index in own:
                tokens = (row == index).nonzero()[:, 0]
                some = tokens[torch.randperm(len(tokens), generator=chance)[:SAMPLES].to(tokens.device)]
                chosen.append(some)
                rows.append(torch.full_like(some, index))
        held = [] if self.hold is None else [self.router.rows.index(row) for row in self.hold.old]
        for number, part in enumerate(self.router.parts):
            features = torch.cat([q[number] for q, _ in seen])[torch.cat(chosen)]
            old = torch.isin(part.samples.rows, torch.tensor(held, device=part.samples.rows.device))
            kept, of = part.samples.features[old].to(features), part.samples.rows[old]
            part.samples.set(torch.cat([kept, features]), torch.cat([of, *rows]))

    def _class_weights(self) -> dict[str, torch.Tensor]:
        """Each row of a layer weighs the same, whatever its share of the training tokens."""
        tokens = torch.zeros(len(self.labels.domains))
        for row in self.rows:
            tokens += torch.bincount(row.domain_ids, minlength=len(tokens))
        weights = {}
        for layer, rows in self.labels.rows.items():
            share = torch.zeros(len(rows)).index_add(0, self.labels.targets[layer], tokens)
            weights[layer] = torch.where(share > 0, share.sum() / share.clamp_min(1), 0.0)
            if self.settings.starts and not share[-1]:  # the null has no text but the starts
                weights[layer][-1] = weights[layer][:-1].mean()
            weights[layer] /= weights[layer].max()
        return weights

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collate([self.rows[index] for index in indices], self._pad).to(self.processes.device)

    @property
    def _pad(self) -> int:
        return int(self.model.tokenizer.pad_token_id or 0)

    def _save(self) -> None:
        if self.processes.is_main:
            save_state(self.state_file, self.parameters, self.optimizer, self.counters)
        self.processes.wait()

    def _fingerprint(self) -> str:
        record = json.dumps([asdict(self.settings), len(self.rows)], default=str)
        digest = hashlib.sha256(record.encode())
        for row in self.rows:
            digest.update(row.input_ids.numpy().tobytes())
        return digest.hexdigest()


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
