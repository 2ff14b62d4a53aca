"""The held-out questions of public benchmarks as task files of lm-evaluation-harness, which it reads without a network.

Questions are those of the test split alone (by id hash), less those that share a run of 13 words with a training item;
they are asked as training asks: in a prompt form, through the chat format.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from molora.errors import DataError

from .forms import FORMS
from .items import Item
from .overlap import without_overlap
from .prepare import READERS

PREFIX = "molora_"


@dataclass(frozen=True)
class Benchmark:
    """``domain`` whose items with ids that begin with ``source`` it is; generates: an answer is written and its last
    number compared, else one of its choices is picked by its likelihood."""

    domain: str
    source: str
    generates: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("math", "gsm8k-", generates=True),
    "medmcqa": Benchmark("medicine", "medmcqa-"),
    "medqa": Benchmark("medicine", "medqa-"),
    "sciq": Benchmark("science", "sciq-"),
    "arc_easy": Benchmark("science", "arc_easy-"),
    "arc_challenge": Benchmark("science", "arc_challenge-"),
    "openbookqa": Benchmark("science", "openbookqa-"),
    "boolq": Benchmark("reading", "boolq-"),
    "csqa": Benchmark("commonsense", "csqa-"),
    "socialiqa": Benchmark("commonsense", "socialiqa-"),
    "piqa": Benchmark("commonsense", "piqa-"),
    "winogrande": Benchmark("commonsense", "winogrande-"),
    "hellaswag": Benchmark("commonsense", "hellaswag-"),
}


def write_benchmarks(
    folder: Path, names: Iterable[str] = BENCHMARKS, items: Mapping[str, Iterable[Item]] | None = None
) -> dict[str, tuple[int, int]]:
    """Writes ``molora_<name>.yaml`` and ``<name>.jsonl`` to ``folder``.

    Args:
        folder: for ``lm_eval --include_path``.
        names: of ``BENCHMARKS``.
        items: by domain; None: read from their packages.

    Returns:
        By name: how many questions, and how many were left out for overlap with training.

    Raises:
        DataError: there is no such benchmark, or a package cannot be had.
    """
    names = list(names)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise DataError(f"There is no benchmark '{unknown[0]}': choose from {', '.join(BENCHMARKS)}")
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, list[Item]] = {}
    counts = {}
    for name in names:
        of = BENCHMARKS[name]
        if of.domain not in known:
            known[of.domain] = list(READERS[of.domain]() if items is None else items[of.domain])
        own = [item for item in known[of.domain] if item.id.startswith(of.source) and item.split == "test"]
        clean = without_overlap(own, (item for item in known[of.domain] if item.split == "train"))
        _write(folder, name, of, clean)
        counts[name] = (len(clean), len(own) - len(clean))
    return counts


def _write(folder: Path, name: str, of: Benchmark, items: list[Item]) -> None:
    file = folder / f"{name}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for item in items:
            out.write(json.dumps(_row(item, of), ensure_ascii=False) + "\n")
    task: dict[str, Any] = {
        "task": f"{PREFIX}{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if of.generates:
        task |= {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 256, "do_sample": False},
            "filter_list": [
                {
                    "name": "last-number",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)", "group_select": -1},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}
            ],
        }
    else:
        task |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
    (folder / f"{PREFIX}{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def _row(item: Item, of: Benchmark) -> dict[str, Any]:
    question = FORMS[item.kind][0].template.format(**item.body)  # the bare one, which holds no instruction
    if of.generates:
        return {"id": item.id, "question": question, "answer": item.answers["hashes"].rsplit("####", 1)[1].strip()}
    choices = list(item.choices) or ["Yes", "No"]  # of questions about a passage these are the options
    right = item.right if item.choices else choices.index(item.answers["plain"])
    return {"id": item.id, "question": question, "choices": choices, "gold": right}
