"""What a training of a text network leaves: the network, its model card and metrics."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from molora.personalize.text_net import TextNet
from molora_training.checkpoint import place_folder
from molora_training.hypernet.text_settings import TextHypernetSettings

_WAYS = {
    "learn": "from the conversations themselves, through the frozen base",
    "reconstruct": "by the squared error to the factors of adapters that were trained before",
}
_SETS = {"held_out": "groups that it never saw", "trained": "groups that it learnt from"}


def write_net(net: TextNet, settings: TextHypernetSettings, metrics: dict[str, Any], command: str | None) -> None:
    """Puts the network into ``settings.out``, its weights in bfloat16. The folder appears complete, or not at all."""
    out = settings.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as scratch:
        made = Path(scratch) / "net"
        net.save(made, torch.bfloat16)
        os.chmod(made, 0o755)
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(model_card(settings, metrics, command), encoding="utf-8")
        place_folder(made, out)


def model_card(settings: TextHypernetSettings, metrics: dict[str, Any], command: str | None) -> str:
    """The network's README.md: what it is, data and licence, how it was made, what was measured."""
    data, net, loop, figures = settings.data, settings.net, settings.loop, metrics["validation"]
    targets = net.targets if isinstance(net.targets, str) else ", ".join(net.targets)
    lines = [
        "---",
        f"base_model: {settings.base}",
        "tags:",
        "- lora",
        "- molora",
        "---",
        "",
        f"# {settings.out.name}",
        "",
        f"A network that turns the embedding of a text (`{settings.encoder}`) into a LoRA adapter (rank {net.rank}, "
        f"{targets}) for `{settings.base}`. Head {net.head}, width {net.width}, {metrics['parameters']:,} parameters.",
        "",
        "## Data",
        f"- Source: {data.source}",
        f"- Licence of the data: {data.licence}",
        f"- {metrics['trained_groups']} groups to learn from with {metrics['train_conversations']} conversations and "
        f"{metrics['texts']} texts, and {metrics['held_out_groups']} held out; no conversation longer than "
        f"{data.max_length} tokens",
        "",
        "## Training",
        f"- Command: `{command}`" if command else "- Made by `molora_training.hypernet.text.train`",
        f"- {_WAYS[settings.way][0].upper()}{_WAYS[settings.way][1:]}",
        f"- Seed {loop.seed}, step {metrics['best_step']} (the best) of {metrics['steps']}, each of "
        f"{settings.groups} groups with up to {settings.conversations} conversations each, peak learning rate "
        f"{loop.learning_rate:g}, base in {settings.dtype}",
        f"- {metrics['seconds']:.0f} s on {metrics['machine']}",
        "",
        "## Loss for each answer token of validation conversations (natural logarithm)",
        "| | right text | another group's text | random direction | no adapter |",
        "|---|---|---|---|---|",
    ]
    for name, words in _SETS.items():
        found = [figures.get(f"{name}/{text}") for text in ("right", "shuffled", "random", "none")]
        if None not in found:
            lines.append(f"| {words} | " + " | ".join(f"{value:.4f}" for value in found) + " |")
    lines += [
        "",
        "What the right text gains over another group's is what the text is worth; the rest is learnt of all groups "
        "alike. The base's licence applies as well. Nothing but this loss was measured: no evaluation of safety was "
        "made.",
    ]
    return "\n".join(lines) + "\n"
