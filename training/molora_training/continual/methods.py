"""Ways for an adapter to learn something new and keep what it knew, behind one interface.

Each goes on from the version that serves and may hold it back while it learns. Replay is no way of its own: what is
remembered is learnt beside the new under any of them, and without a memory `plain` is sequential fine-tuning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from molora.adapter import Adapter
from molora.base import load_base
from molora_training.checkpoint import save_tensors
from molora_training.continual.growth import recompress, widen
from molora_training.continual.penalties import elastic, fisher, orthogonal
from molora_training.data import IGNORED, Batch, Encoded, Example, collate, encode_within

MethodName = Literal["plain", "elastic", "orthogonal", "distil"]
EXAMPLES = 64  # of which the Fisher information is the mean
EVERY = 4  # tokens, of which the first is distilled


@dataclass(frozen=True)
class Task:
    """What is learnt. base: of the adapter. examples: the new ones, of which those over ``max_length`` tokens do not
    count. dtype: of the frozen base. state: the file in which the method keeps what it has to know at the next task; it
    need not exist."""

    base: str
    examples: Sequence[Example]
    max_length: int
    dtype: torch.dtype
    state: Path
    seed: int = 0


class Method:
    """Going on without being held back: a trainer's :class:`~molora_training.adapter_run.Hold`, and what is done before
    and after."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def start(self, served: Path, work: Path) -> Path:
        """The adapter to go on from: the one that serves, or one made from it in ``work``."""
        return served

    def prepare(self, model: Any) -> None:
        """Sees the model before the first step."""

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        """What is added to the mean loss of a step."""
        return None

    def finish(self, trained: Path, work: Path) -> Path:
        """What becomes the new version: ``trained``, or an adapter made from it in ``work``."""
        return trained

    def keep(self, version: Path) -> None:
        """Writes what has to be known at the next task, once the version serves."""


class Elastic(Method):
    """Elastic weight consolidation (arXiv 1612.00796, equation 3): what mattered for tasks before moves little.

    The Fisher information of all tasks is one sum, in which each new task takes away a share of the older ones' weight
    (online, arXiv 1805.06370), so that it takes as much room as one.
    """

    strength = 400.0
    decay = 0.9

    def prepare(self, model: Any) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.anchor = {name: p.detach().clone() for name, p in self.parameters.items()}
        before = self._before()
        self.importance = {name: f.to(self.anchor[name].device) for name, f in before.items()}

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        if not self.importance:  # of the first task nothing is known that came before
            return None
        return elastic(self.parameters, self.anchor, self.importance, self.strength)

    def keep(self, version: Path) -> None:
        from peft import PeftModel

        base, tokenizer = load_base(self.task.base, dtype=self.task.dtype)
        model = PeftModel.from_pretrained(base, version, is_trainable=True).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        domains = sorted({example.domain for example in self.task.examples})
        rows = encode_within(self.task.examples, tokenizer, self.task.max_length, domains)
        losses = [partial(_summed_loss, model, row, tokenizer.pad_token_id or 0) for row in rows[:EXAMPLES]]
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


class Orthogonal(Method):
    """New ranks for each task, which read what the older ones do not (O-LoRA, arXiv 2310.14152); the older ones stay.

    The adapter grows by ``ranks`` with each task. Once the next would bring it over ``most``, it is cut to half of that
    by its singular values.
    """

    ranks = 8
    most = 64
    strength = 0.5

    def start(self, served: Path, work: Path) -> Path:
        self.older = Adapter.load(served).ranks[0]
        widen(served, self.ranks, work / "wider", self.task.seed)
        return work / "wider"

    def prepare(self, model: Any) -> None:
        self.new, self.old = {}, {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            learns = torch.ones_like(parameter)
            if ".lora_A." in name:
                learns[: self.older] = 0
                self.new[name], self.old[name] = parameter, parameter.detach()[: self.older].clone()
            else:
                learns[:, : self.older] = 0
            parameter.register_hook(partial(torch.mul, learns))

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        now = {name: parameter[self.older :] for name, parameter in self.new.items()}
        return orthogonal(now, [self.old], self.strength)

    def finish(self, trained: Path, work: Path) -> Path:
        if Adapter.load(trained).ranks[0] + self.ranks <= self.most:
            return trained
        recompress(trained, self.most // 2, work / "narrower")
        return work / "narrower"


class Distil(Method):
    """Learning without forgetting (arXiv 1606.09282): in the questions of the new text the adapter is to foretell what
    it foretold before. Nothing is kept for it."""

    strength = 1.0

    def prepare(self, model: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        places = torch.arange(0, batch.input_ids.shape[1], EVERY, device=batch.input_ids.device)
        asked = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False,
            "logits_to_keep": places,
        }  # fmt: skip
        with torch.no_grad():
            taught = torch.func.functional_call(model, self.before, kwargs=asked).logits.float().log_softmax(-1)
        said = model(**asked).logits.float().log_softmax(-1)
        after = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)[:, places]
        counts = (after == IGNORED) & batch.attention_mask[:, places].bool()
        each = nn.functional.kl_div(said, taught, reduction="none", log_target=True).sum(-1)
        return self.strength * (each * counts).sum() / counts.sum().clamp_min(1)


METHODS: dict[str, Callable[[Task], Method]] = {
    "plain": Method, "elastic": Elastic, "orthogonal": Orthogonal, "distil": Distil
}  # fmt: skip


def _summed_loss(model: Any, row: Encoded, pad_id: int) -> torch.Tensor:
    """The negative log-likelihood of a row's answers."""
    batch = collate([row], pad_id).to(model.device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    labels = batch.labels[0, 1:]
    return nn.functional.cross_entropy(logits[0, :-1].float(), labels, ignore_index=IGNORED, reduction="sum")
