"""A task of a few words and the tiny model that learns it, for tests of ways of learning without forgetting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora_training.continual.method import Task
from molora_training.data import Example, encode_within
from tests.unit.spoken import make_spoken


def make_task(folder: Path) -> Task:
    """With a base in ``folder``/base and an adapter of rank 4 in ``folder``/adapters/math."""
    model = make_spoken(folder / "adapters")
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    return saying(Task(str(folder / "base"), [], 64, torch.float32, folder / "state.safetensors"), "ab")


def saying(task: Task, answer: str) -> Task:
    """Another task: three questions with this answer."""
    examples = [
        Example(
            f"{n}", "math", "train", ({"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer})
        )
        for n in range(3)
    ]
    return replace(task, examples=examples)


def learner(task: Task, served: Path) -> Any:
    """PEFT's own model of a version."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(task.base), served, is_trainable=True)


def rows_of(task: Task) -> Any:
    return encode_within(task.examples, AutoTokenizer.from_pretrained(task.base), task.max_length, ["math"])


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
