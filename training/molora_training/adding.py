"""An adapter that comes later: its row of the router computed from a few examples, or trained on for a little beside a
few of the others', against a router trained anew."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel
from molora.chat import render
from molora.errors import ConfigError
from molora_training import router
from molora_training.data import Encoded, Example, encode_within, mix, read_examples, write_examples
from molora_training.evaluate import LAYER, batches, chosen_domains, losses
from molora_training.quality_sets import COUNT, MAX_TOKENS
from molora_training.report import heading, line, write_report
from molora_training.router_settings import RouterTrainSettings, learnt_null_start

EXAMPLES = (32, 128, 512)
BARRED = 128  # the number of examples that the lines are about
REPLAYED = 256  # examples of each old domain in a short training
SHORT = (900, 600, 600, 300)  # conversations, documents, double questions and asides of that training
TRAINED = f"trained on with {REPLAYED} of each other domain"


def run(
    few: Path, full: Path, data: Path, out: Path, command: str, limit: int = 0, batch_tokens: int = 8192
) -> dict[str, Any]:
    """Measures and writes ``out``.

    Args:
        few: a saved MoLoRA whose router was trained without some of the adapters.
        full: one with all of them, whose router was trained on all.
        data: prepared data of all domains.
        out: the report.
        command: to be named in it.
        limit: only so many sequences of each set (0: all).
        batch_tokens: padded tokens in one forward.

    Raises:
        ConfigError: ``full`` has no adapter that ``few`` lacks.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = MoLoRAModel.from_pretrained(full, dtype=torch.bfloat16).to(device)
    model = MoLoRAModel.from_pretrained(few, dtype=torch.bfloat16).to(device)
    domains = list(whole.stack[LAYER].adapters)
    new = [name for name in domains if name not in model.stack[LAYER].adapters]
    if not new:
        raise ConfigError(f"{full} has no adapter in '{LAYER}' that {few} lacks.")
    test = _Test(model, domains, new, data, limit, batch_tokens)
    rows = [test.measure("trained on all", whole), test.measure("before", model)]
    paths = {name: whole.stack[LAYER].adapters[name] for name in new}
    for count in EXAMPLES:
        for name in new:
            examples = read_examples(data / f"{name}.train.jsonl")[:count]
            model.add_adapter(LAYER, name, paths[name], examples=[_text(model, example) for example in examples])
        rows.append(test.measure(f"{count} examples", model))
        with tempfile.TemporaryDirectory() as work:
            trained = _trained(model, new, data, count, Path(work), learnt_null_start(few)).to(device)
            rows.append(test.measure(f"{count} examples, {TRAINED}", trained))
        for name in new:
            model.remove_adapter(LAYER, name)
    report = {
        **heading(command, f"test split by sha256 of the task or document id; new: {', '.join(new)}"),
        "new": new,
        "rows": rows,
        "must": must(rows, new),
    }
    write_report(report, out)
    return report


def _trained(
    model: MoLoRAModel, new: Sequence[str], data: Path, count: int, work: Path, null_start: int
) -> MoLoRAModel:
    """``model`` with its router trained on for a little, on the new domains' examples and a few of the others'."""
    model.save_pretrained(work / "added")
    for name in model.stack[LAYER].adapters:
        for split in ("train", "validation"):
            some = read_examples(data / f"{name}.{split}.jsonl")[: count if name in new else REPLAYED]
            write_examples(work / "data" / f"{name}.{split}.jsonl", some)
    settings = RouterTrainSettings(
        model=work / "added", out=work / "trained", data=work / "data", start="saved", epochs=1, batch_tokens=4096,
        mixed=SHORT[0], documents=SHORT[1], in_a_turn=SHORT[2], asides=SHORT[3], null_start=null_start,
    )  # fmt: skip
    router.train(settings)
    shutil.rmtree(settings.work, ignore_errors=True)
    return MoLoRAModel.from_pretrained(settings.out, dtype=model.base.dtype)


class _Test:
    """Held-out text of single domains and of several."""

    def __init__(
        self, model: MoLoRAModel, domains: list[str], new: list[str], data: Path, limit: int, batch_tokens: int
    ) -> None:
        self.domains, self.new, self.batch_tokens = domains, new, batch_tokens
        some = slice(limit or None)
        test = {name: read_examples(data / f"{name}.test.jsonl") for name in domains}
        old = {name: rows for name, rows in test.items() if name not in new}

        def encoded(rows: Sequence[Any]) -> list[Encoded]:
            return encode_within(rows, model.tokenizer, MAX_TOKENS, domains)

        self.single = {name: encoded(rows[some]) for name, rows in test.items()}
        self.mixed = {"all": encoded(mix(test, "test", COUNT)[some]), "old": encoded(mix(old, "test", COUNT)[some])}

    def measure(self, name: str, model: MoLoRAModel) -> dict[str, Any]:
        """Share of tokens that go to their own domain, and loss, by domain; loss on mixed text."""
        choice = {layer.name: None for layer in model.stack.layers} | {LAYER: "auto"}

        def loss(rows: Sequence[Encoded]) -> float:
            return losses(model, rows, choice, len(self.domains), None, self.batch_tokens).mean

        row: dict[str, Any] = {
            "contender": name,
            "right": {domain: self._right(model, rows, choice) for domain, rows in self.single.items()},
            "single": {domain: loss(rows) for domain, rows in self.single.items()},
            "mixed": {of: loss(rows) for of, rows in self.mixed.items()},
            "mixed_right": {of: self._right(model, rows, choice) for of, rows in self.mixed.items()},
        }
        print(f"{name}: new {[round(row['right'][one], 3) for one in self.new]}, mixed {row['mixed']}", flush=True)
        return row

    @torch.no_grad()
    def _right(self, model: MoLoRAModel, rows: Sequence[Encoded], choice: dict[str, Any]) -> float:
        right = count = 0
        for _, batch in batches(model, rows, self.batch_tokens):
            chosen = chosen_domains(model, batch, choice, self.domains)
            real = batch.attention_mask.bool()
            right += int((chosen == batch.domain_ids)[real].sum())
            count += int(real.sum())
        return right / count


def must(rows: Sequence[dict[str, Any]], new: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of BARRED examples, against the router that was trained on all and the one before."""
    by_name = {row["contender"]: row for row in rows}
    full, before = by_name["trained on all"], by_name["before"]
    lines = []
    for how in (f"{BARRED} examples", f"{BARRED} examples, {TRAINED}"):
        added = by_name[how]
        shares = {f"on {name}": (added["right"][name], full["right"][name]) for name in new}
        shares["on all mixed"] = (added["mixed_right"]["all"], full["mixed_right"]["all"])
        for of, (mine, theirs) in shares.items():
            kept = mine / theirs if theirs else 1.0  # where nothing was right, nothing is lost
            lines.append(line(f"{how}: share of the retrained router's accuracy {of}", kept, 0.97, "higher"))
        changes = {n: added["single"][n] / before["single"][n] - 1 for n in before["single"] if n not in new}
        worst = max(changes, key=lambda name: abs(changes[name]))
        value = abs(changes[worst])
        lines.append(line(f"{how}: loss on an old domain changes by", value, 0.005, "lower", f"most on {worst}"))
    return lines


def _text(model: MoLoRAModel, example: Example) -> str:
    return str(render(model.tokenizer, list(example.messages), add_generation_prompt=False))
