"""A routed small model against a larger one without adapters, question by question, through the same harness."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from molora import MoLoRAModel
from molora_training.evaluate import bootstrap
from molora_training.harness import AskedAsOurs, MoLoRALM, right_answers
from molora_training.report import heading, line, write_report

BENCHMARKS = ("arc_easy", "arc_challenge", "boolq", "socialiqa", "piqa", "hellaswag")  # of 500 questions and more
WON = 4  # that are to be won
BASE, ROUTED = "base", "MoLoRA"
OURS, ITS_OWN = "our prompts", "its own template"


def run(
    model: Path, other: Path, tasks: Path, out: Path, command: str, limit: int = 0, batch_size: int = 32
) -> dict[str, Any]:
    """Measures and writes ``out``.

    Args:
        model: a saved MoLoRA; its stack's defaults act.
        other: a model for ``transformers``: a folder.
        tasks: task files of :func:`molora_training.data.benchmarks.write_benchmarks`.
        out: the report.
        command: to be named in it.
        limit: only so many questions of each benchmark (0: all).
        batch_size: sequences in one forward.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    routed = MoLoRAModel.from_pretrained(model, dtype=torch.bfloat16).to(device)
    off = dict.fromkeys([layer.name for layer in routed.stack.layers])
    larger: dict[str, Any] = {"pretrained": str(other), "dtype": "bfloat16", "device": device, "batch_size": batch_size}
    contenders = {
        BASE: lambda: MoLoRALM(routed, off, batch_size=batch_size),
        ROUTED: lambda: MoLoRALM(routed, batch_size=batch_size),
        f"{other.name}, {OURS}": lambda: AskedAsOurs(**larger),
        f"{other.name}, {ITS_OWN}": lambda: HFLM(**larger),
    }
    parameters, right = {}, {}
    for name, make in contenders.items():
        lm = make()
        parameters[name] = sum(parameter.numel() for parameter in lm.model.parameters())
        right[name] = right_answers(lm, tasks, BENCHMARKS, limit or None)
        print(f"{name}: { ({of: round(float(own.float().mean()), 4) for of, own in right[name].items()}) }", flush=True)
    report = {
        **heading(command, "test split by sha256 of the task id, less what shares 13 words with a training question"),
        "parameters": parameters,
        "rows": [row(name, {of: own[name] for of, own in right.items()}) for name in BENCHMARKS],
    }
    won = sum(one["difference"] > 0 for one in report["rows"])
    clearly = sum(one["difference_interval"][0] > 0 for one in report["rows"])
    note = f"clearly, with an interval above 0: {clearly}"
    report["must"] = [line("benchmarks on which MoLoRA is ahead of the larger model", won, WON, "higher", note)]
    write_report(report, out)
    return report


def row(name: str, right: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A benchmark: accuracies, and how far MoLoRA is ahead of the larger model's better way of being asked, with the
    interval over questions."""
    accuracy = {of: float(own.float().mean()) for of, own in right.items()}
    better = max((of for of in right if of not in (BASE, ROUTED)), key=accuracy.__getitem__)
    lead = right[ROUTED].double() - right[better].double()
    return {
        "benchmark": name,
        "questions": len(lead),
        "accuracy": accuracy,
        "against": better,
        "difference": float(lead.mean()),
        "difference_interval": list(bootstrap(lambda index: lead[index].mean(-1), len(lead))),
    }
