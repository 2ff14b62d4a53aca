"""What every way of learning without forgetting is made of: the task, the hold on a training, and ranks that grow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.adapter import Adapter
from molora.base import base_folder, load_base
from molora_training.continual.growth import recompress, widen
from molora_training.data import IGNORED, Batch, Encoded, Example, collate, encode_within

EXAMPLES = 64  # of the new ones at most, that a method looks at beside the training


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


class Growing(Method):
    """New ranks for each task, beside older ones that stay as they are.

    The adapter grows by ``ranks`` with each task. Once the next would bring it over ``most``, it is cut to half of that
    by its singular values.
    """

    ranks = 8
    most = 64

    def start(self, served: Path, work: Path) -> Path:
        self.older = Adapter.load(served).ranks[0]
        widen(served, self.ranks, work / "wider", self.task.seed)
        return work / "wider"

    def prepare(self, model: Any) -> None:
        for name, parameter in trainable(model).items():
            learns = torch.ones_like(parameter)
            (learns if ".lora_A." in name else learns.T)[: self.older] = 0
            parameter.register_hook(partial(torch.mul, learns))

    def finish(self, trained: Path, work: Path) -> Path:
        if Adapter.load(trained).ranks[0] + self.ranks <= self.most:
            return trained
        recompress(trained, self.most // 2, work / "narrower")
        return work / "narrower"


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_layers(model: Any) -> dict[str, Any]:
    """PEFT's modules with the adapter, by name."""
    return {name: module for name, module in model.named_modules() if "default" in getattr(module, "lora_A", ())}


def first_rows(task: Task) -> list[Encoded]:
    """The first EXAMPLES of a task that are short enough."""
    from transformers import AutoTokenizer

    domains = sorted({example.domain for example in task.examples})
    tokenizer = AutoTokenizer.from_pretrained(base_folder(task.base))
    return encode_within(task.examples, tokenizer, task.max_length, domains)[:EXAMPLES]


def opened(task: Task, version: Path) -> Any:
    """PEFT's model of a version, which may be trained, in evaluation mode on the accelerator if there is one."""
    from peft import PeftModel

    base, _ = load_base(task.base, dtype=task.dtype)
    model = PeftModel.from_pretrained(base, version, is_trainable=True).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def summed_loss(model: Any, row: Encoded) -> torch.Tensor:
    """The negative log-likelihood of a row's answers."""
    batch = collate([row], 0).to(model.device)  # one row has no padding
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    labels = batch.labels[0, 1:]
    return nn.functional.cross_entropy(logits[0, :-1].float(), labels, ignore_index=IGNORED, reduction="sum")
