"""An adapter trained on top of a routed stack: at run time it does what it did in training."""

import dataclasses
from pathlib import Path

import pytest
import torch

from molora import MoLoRAModel, StackLayer
from molora_training.adapter import train
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.data import Example, encode_within, mix, read_conversations, write_examples
from molora_training.evaluate import losses
from tests.conftest import DEVICE
from tests.unit.spoken import make_spoken

DOMAINS = ("math", "code")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterTrainSettings:
    """Thirty steps on conversations of two domains and of one, on top of a stack that routes between two adapters."""
    monkeypatch.chdir(tmp_path)
    model = make_spoken(tmp_path)
    model.save_pretrained(tmp_path / "stack")
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    files = {}
    for split in ("train", "validation"):
        rows = {name: [example(name, split, number) for number in range(8)] for name in DOMAINS}
        files[split] = tmp_path / f"mixed.{split}.jsonl"
        write_examples(files[split], [*mix(rows, split, 8), *rows["math"]])
    return AdapterTrainSettings(
        out=tmp_path / "integration",
        data=DataFiles(files["train"], files["validation"]),
        lora=LoraShape(rank=4, alpha=8),
        base=str(tmp_path / "base"),
        stack=tmp_path / "stack",
        learning_rate=1e-2,
        epochs=30,
        max_steps=30,
        batch_tokens=512,
        checkpoint_every=4,
        dtype="float32",
    )


def example(name: str, split: str, number: int) -> Example:
    messages = ({"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": f"so {name} {number % 2}"})
    return Example(f"{name}-{number}", name, split, messages)  # type: ignore[arg-type]


def loss(settings: AdapterTrainSettings, model: MoLoRAModel) -> float:
    rows = encode_within(read_conversations(settings.data.validation), model.tokenizer, 512, DOMAINS)
    return losses(model, rows, {}, len(DOMAINS)).mean


def test_it_does_at_run_time_what_it_did_in_training(settings: AdapterTrainSettings) -> None:
    metrics = train(settings)
    assert settings.stack is not None
    model = MoLoRAModel.from_pretrained(settings.stack, base=settings.base, dtype=torch.float32).to(DEVICE)
    assert loss(settings, model) == pytest.approx(metrics["base_validation_loss"], rel=1e-5)  # the routed stack's
    assert metrics["validation_loss"] < metrics["base_validation_loss"] - 0.2
    model.stack.layers.append(StackLayer("integration", {}, default=None))
    model.add_adapter("integration", "shared", settings.out)
    model.stack["integration"].default = "shared"
    assert loss(settings, model) == pytest.approx(metrics["validation_loss"], rel=2e-3)  # it is stored in bfloat16
    assert f"on top of the stack `{settings.stack.name}`" in (settings.out / "README.md").read_text()


def test_the_stack_acts_while_it_learns(settings: AdapterTrainSettings) -> None:
    ours = train(settings)
    alone = train(dataclasses.replace(settings, stack=None, out=settings.out.with_name("alone")))
    assert ours["base_validation_loss"] != pytest.approx(alone["base_validation_loss"], rel=1e-4)
    assert ours["train_losses"][0] != pytest.approx(alone["train_losses"][0], rel=1e-4)
    assert ours["parameters"] == alone["parameters"]  # the same modules
