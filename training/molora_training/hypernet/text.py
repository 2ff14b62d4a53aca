"""Train a network that turns the embedding of a text into an adapter (Text-to-LoRA; Profile-to-PEFT, arXiv 2510.16282).

- groups (users, or tasks) have conversations and texts; a text's adapter is to make its group's answers likely
- the base stays frozen: the loss of answer tokens goes through it to the factors, and from there to the network
- or, for comparison, the factors of adapters that were trained before are what it learns
- validation on groups that it never sees, and always beside the right text: another group's, a random one, no adapter
- several processes share each step
- resumable; a loss that is not finite ends the training with a sentence, and the last checkpoint stays
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.adapter import Adapter
from molora.base import load_base
from molora.errors import AdapterMismatchError
from molora.personalize.embeddings import SentenceEncoder
from molora.personalize.from_text import TextEncoder
from molora.personalize.generated import generated
from molora.personalize.text_net import TextNet, TextNetConfig
from molora_training.adapter_run import answer_count
from molora_training.attention import attend_causally
from molora_training.batches import rounded
from molora_training.data import IGNORED, Encoded, collate
from molora_training.hypernet.loop import Loop
from molora_training.hypernet.text_groups import Groups, Judged, draw, judged, read_groups
from molora_training.hypernet.text_output import write_net
from molora_training.hypernet.text_settings import TextHypernetSettings
from molora_training.processes import Processes
from molora_training.token_losses import TokenLosses

Batched = Mapping[str, tuple[Tensor, Tensor]]


def train(
    settings: TextHypernetSettings,
    resume: bool = True,
    command: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
    encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """Trains and writes the network to ``settings.out``; checkpoints and curves lie in ``settings.work``.

    Args:
        settings: what to train.
        resume: go on from the checkpoint of the same settings if there is one; False starts anew.
        command: the command line to name in the model card.
        on_step: called after each step with the number of finished steps and the loss.
        encoder: in place of the one that ``settings.encoder`` names.

    Returns:
        The metrics of ``metrics.json``.

    Raises:
        ConfigError: settings that do not fit, or a checkpoint of others. DataError: data that is missing or unusable.
        AdapterError: an adapter to reconstruct is missing, or of another shape.
        NonFiniteError: the loss is not finite; the last checkpoint stays.
    """
    started = time.monotonic()
    processes = Processes()
    processes.need(settings.groups, "groups")
    device = processes.device if torch.cuda.is_available() else torch.device("cpu")
    with processes.main_first():
        base, tokenizer = load_base(settings.base, dtype=getattr(torch, settings.dtype))
    base.to(device).requires_grad_(False)
    encode = encoder or SentenceEncoder(settings.encoder, device).encode
    groups = read_groups(settings.data, tokenizer, encode)
    run = _Run(settings, base, tokenizer.pad_token_id, groups, processes)
    loop = Loop(
        run.loss,
        dict(run.net.named_parameters()),
        run.validate,
        "held_out/right" if groups.held_out else "trained/right",
        settings.work,
        settings.loop,
        _fingerprint(settings, groups),
        f"hypernet {settings.out.name}",
        processes,
    )
    counters = loop.run(resume, on_step)
    metrics = {
        "validation": counters["best"][1],
        "best_step": counters["best"][0],
        "train_loss": counters["losses"][-1],
        "steps": counters["step"],
        "trained_groups": len(groups.trained),
        "held_out_groups": len(groups.held_out),
        "texts": sum(len(group.embeddings) for group in groups.trained),
        "train_conversations": sum(len(group.train) for group in groups.trained),
        "parameters": run.net.parameter_count,
        "validations": counters["validation"],
        "train_losses": counters["losses"],
        "seconds": round(time.monotonic() - started, 1),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "processes": processes.count,
        "command": command,
        "settings": settings.record(),
    }
    if processes.is_main:
        write_net(run.net, settings, metrics, command)
    loop.done()
    return metrics


class _Run:
    """The network, what it learns from, and how it is judged."""

    def __init__(
        self, settings: TextHypernetSettings, base: Any, pad_id: int, groups: Groups, processes: Processes
    ) -> None:
        self.processes = processes
        self.settings, self.base, self.pad_id, self.groups = settings, base, pad_id, groups
        self.device = base.device
        attend_causally(base, rounded(settings.data.max_length))
        self.token_losses = TokenLosses(base)
        torch.manual_seed(settings.loop.seed)
        self.net = TextNet(config_for(settings, base, groups.trained[0].embeddings.shape[1])).to(self.device)
        self.net.standardise(torch.cat([group.embeddings for group in groups.trained]).to(self.device))
        self.wanted = {} if settings.adapters is None else self._targets(settings.adapters)
        sets = {"held_out": groups.held_out, "trained": groups.trained}
        self.judged = {name: judged(groups, own, settings.loop.seed) for name, own in sets.items() if own}
        self.without: dict[str, float] = {}  # what no adapter gives is the same each time

    def loss(self, step: int) -> dict[str, Tensor]:
        """This process's part of the loss of a step, which its number alone decides."""
        settings = self.settings
        rng = random.Random(f"{settings.loop.seed}/{step}")
        torch.manual_seed(settings.loop.seed * 1_000_003 + step)  # dropout
        drawn = draw(self.groups.trained, settings.groups, settings.conversations, rng)
        # Of all texts in every process, so that dropout falls alike: it is the base that takes time.
        factors = self.net.train()(torch.stack([embedding for _, embedding, _ in drawn]).to(self.device))
        places = list(self.processes.own(range(len(drawn))))
        if self.wanted:
            own = {name: (A[places], B[places]) for name, (A, B) in factors.items()}
            distance = _distance(own, [self.wanted[drawn[place][0].name] for place in places])
            return {"loss": distance * (len(places) / len(drawn))}
        rows = [row for place in places for row in drawn[place][2]]
        owners = torch.tensor([place for place in places for _ in drawn[place][2]], device=self.device)
        own = {name: (A[owners], B[owners]) for name, (A, B) in factors.items()}
        return {"loss": self._summed(rows, own) / sum(answer_count(row) for _, _, some in drawn for row in some)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss for each answer token, by set of groups and by text: see :func:`judged`."""
        self.net.eval()
        found = {}
        for name, asked in self.judged.items():
            for text, embeddings in asked.embeddings.items():
                if embeddings is None:
                    if name not in self.without:
                        self.without[name] = self._mean(asked, None)
                    found[f"{name}/{text}"] = self.without[name]
                else:
                    found[f"{name}/{text}"] = self._mean(asked, embeddings)
        return found

    def _mean(self, asked: Judged, embeddings: Tensor | None) -> float:
        rows = asked.rows
        order = sorted(range(len(rows)), key=lambda place: (rows[place].input_ids.numel(), place))
        size = self.settings.groups * self.settings.conversations  # as many at a time as in a step
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in self.processes.own(range(0, len(order), size)):
            part = order[start : start + size]
            factors = None if embeddings is None else self.net(embeddings[part].to(self.device))
            total += self._summed([rows[place] for place in part], factors)
        return float(self.processes.total(total)) / sum(map(answer_count, rows))

    def _summed(self, rows: Sequence[Encoded], factors: Batched | None) -> Tensor:
        """Cross-entropy summed over the answer tokens of conversations, each with its own factors."""
        batch = collate(rows, self.pad_id).to(self.device)
        wanted = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        mixed = self.device.type == "cuda" and self.settings.dtype == "bfloat16"
        acting = nullcontext() if factors is None else generated(self.base, factors)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed), acting:
            return self.token_losses(
                lambda: self.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False),
                wanted,
            ).sum()

    def _targets(self, folder: Path) -> dict[str, Batched]:
        """By trained group the factors of its adapter, the scale in B."""
        shapes = {name: (A.shape[1:], B.shape[1:]) for name, (A, B) in self.net(self.net.mean[None]).items()}
        found: dict[str, Batched] = {}
        for group in self.groups.trained:
            adapter = Adapter.load(folder / group.name)
            own = {name: (w.A.shape, w.B.shape) for name, w in adapter.modules.items()}
            if own != shapes:
                raise AdapterMismatchError(
                    f"{adapter.path} cannot be reconstructed: its modules, sizes or rank are not those of net.targets "
                    f"and net.rank."
                )
            found[group.name] = {
                name: (w.A.float().to(self.device), w.B.float().to(self.device) * w.scale)
                for name, w in adapter.modules.items()
            }
        return found


def config_for(settings: TextHypernetSettings, base: Any, embedding: int) -> TextNetConfig:
    """The network's settings for a base and for embeddings of that size. Raises ConfigError where they do not fit."""
    shape = settings.net
    return TextNetConfig.for_base(
        base,
        settings.base,
        embedding,
        shape.targets,
        encoder=settings.encoder,
        width=shape.width,
        rank=shape.rank,
        alpha=shape.alpha,
        head=shape.head,
        dropout=shape.dropout,
    )


def _distance(factors: Batched, wanted: Sequence[Batched]) -> Tensor:
    """Mean squared error of generated factors [N, ...] to those of N adapters, A and B of each module alike."""
    parts = [
        (made - torch.stack([one[name][side] for one in wanted])).square().mean()
        for name, pair in factors.items()
        for side, made in enumerate(pair)
    ]
    return torch.stack(parts).mean()


def _fingerprint(settings: TextHypernetSettings, groups: Groups) -> str:
    """Changes with anything that a checkpoint depends on."""
    digest = hashlib.sha256(json.dumps(settings.record() | {"out": str(settings.out)}, sort_keys=True).encode())
    files = list(groups.files)
    if settings.adapters is not None:
        files += [file for file in sorted(settings.adapters.rglob("*")) if file.suffix in (".json", ".safetensors")]
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
