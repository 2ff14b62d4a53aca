"""What an adapter training leaves: a PEFT folder in bf16 safetensors, a model card and metrics."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from molora_training.adapter_settings import AdapterTrainSettings
from molora_training.checkpoint import place_folder, save_tensors
from molora_training.on_stack import as_plain


def write_adapter(model: Any, settings: AdapterTrainSettings, metrics: dict[str, Any], command: str | None) -> None:
    """Put the trained adapter of `model`, a PeftModel on the CPU or an accelerator, into `settings.out`.

    The weights are stored in bfloat16. The folder appears at once and complete, or not at all.
    """
    from peft import get_peft_model_state_dict

    out = settings.out
    out.parent.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    # The local path of a cached base means nothing to others; a sorted list makes equal runs equal files.
    config.base_model_name_or_path = settings.base
    if settings.stack is not None:
        config.target_modules = {name.removesuffix(".base_layer").rpartition(".")[2] for name in config.target_modules}
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as scratch:
        made = Path(scratch) / "adapter"
        made.mkdir()
        os.chmod(made, 0o755)
        # Left to itself PEFT asks the Hub whether the vocabulary grew; a LoRA adapter holds no embeddings.
        trained = get_peft_model_state_dict(model, dict(model.named_parameters()), save_embedding_layers=False)
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in as_plain(trained).items()}
        save_tensors(made / "adapter_model.safetensors", weights, {"format": "pt"})
        config.save_pretrained(made)
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(model_card(settings, metrics, command), encoding="utf-8")
        place_folder(made, out)


def model_card(settings: AdapterTrainSettings, metrics: dict[str, Any], command: str | None) -> str:
    """The adapter's README.md: front matter, data and licence, how it was made, what was measured."""
    data, lora = settings.data, settings.lora
    on = f", trained on top of the stack `{settings.stack.name}` and to be used with it" if settings.stack else ""
    before = f"`{settings.start.name}`, which it went on from" if settings.start else "base without the adapter"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    lines = [
        "---",
        f"base_model: {settings.base}",
        "library_name: peft",
        "tags:",
        "- lora",
        "- molora",
        "---",
        "",
        f"# {settings.out.name}",
        "",
        f"A LoRA adapter (rank {lora.rank}, alpha {lora.alpha:g}, {'rsLoRA' if lora.rslora else 'LoRA'}, {targets}) "
        f"for `{settings.base}`{on}.",
        "",
        "## Data",
        f"- Source: {data.source}",
        f"- Licence of the data: {data.licence}",
        f"- {metrics['train_examples']} training and {metrics['validation_examples']} validation examples "
        f"(`{data.train.name}`, `{data.validation.name}`), none longer than {data.max_length} tokens",
        "",
        "## Training",
        f"- Command: `{command}`" if command else "- Made by `molora_training.adapter.train`",
        f"- Seed {settings.seed}, {metrics['steps']} steps of up to {settings.batch_tokens} tokens in "
        f"{metrics['processes']} process(es), peak learning rate {settings.learning_rate:g}, base in {settings.dtype}",
        f"- {metrics['seconds']:.0f} s on {metrics['machine']}",
        "",
        "## Loss for each answer token (natural logarithm)",
        "| | validation |",
        "|---|---|",
        f"| {before} | {metrics['base_validation_loss']:.4f} |",
        f"| this adapter (step {metrics['best_step']}) | {metrics['validation_loss']:.4f} |",
        "",
        "The base's licence applies as well. Nothing but this loss was measured: no evaluation of safety was made.",
    ]
    return "\n".join(lines) + "\n"


def settings_record(settings: AdapterTrainSettings) -> dict[str, Any]:
    """The settings as plain values, file names without their folders."""
    record = dataclasses.asdict(settings)
    record["out"] = settings.out.name
    record["start"] = settings.start and settings.start.name
    record["stack"] = settings.stack and settings.stack.name
    record["data"] |= {"train": settings.data.train.name, "validation": settings.data.validation.name}
    return record
