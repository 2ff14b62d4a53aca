"""Measures up to which size each form of a computation is the faster one, and writes it beside the tiles.

python -m benchmarks.forms --out kernels/molora_kernels/tiles.json      # after benchmarks.tune

Each time is of four layers of the 1.7B shape with adapters of rank 16 on all linear modules, once in each form:
- by_token: a prompt of so many tokens over 8 and then 64 adapters, token by token or in blocks of tokens.
- together: a prompt of 2,048 over so many adapters, top-2, both columns of the plan at once or one after the other.
- hot_trained: a router's training step, captured, over so many ranks, all of them multiplied for every token or by
  slot.
"""

import argparse
import json
import sys
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, train
from benchmarks.prefill import FixedPlan, Pass, make_plan
from benchmarks.step import Timer, captured, fill
from benchmarks.tune import write
from molora.blueprint import blueprint
from molora_kernels import forms
from molora_training.attention import attend_causally

LAYERS, RANK = 4, 16
TOKENS = (16, 32, 64, 128, 256)
SLOTS = (4, 8, 12, 16, 24, 32, 64)
TRAINED = (8, 16, 32, 64, 128)  # adapters
EITHER = (0, 1 << 62)  # a limit that nothing is under, and one that all is under


@torch.no_grad()
def prompts_us(base: Any, adapters: list[dict[str, Any]], tokens: int, top: int) -> float:
    """Of a prompt over each set of adapters, together."""
    us, source, plan = 0.0, FixedPlan(), blueprint(base)
    ids = torch.randint(0, 150000, (1, tokens), device="cuda")
    for groups in adapters:
        source.now = make_plan(tokens, next(iter(groups.values())).pages.slots, top, "uniform")
        source.now.paged.blocks  # noqa: B018 - made once a forward
        us += Timer(20)(captured(partial(Pass(base, plan, tokens), ids, groups, source)).replay) * 1e3
    return us


def trained_us(base: Any, count: int) -> float:
    objective = train.make_objective(base, fill(base, count, RANK))
    batch = train.make_batch(8, 512, count, base.config.vocab_size, base.device)
    us = common.Clock(base.device, 5)(train.captured(objective, batch)) * 1e3
    common.release(objective.model)
    return us


def both(form: str, limit: str, size: int, measure: Any) -> dict[str, Any]:
    """The entry of a form at a size; ``limit``: the constant of :mod:`molora_kernels.forms` that says up to where."""
    before, found = getattr(forms, limit), []
    for value in EITHER:
        setattr(forms, limit, value)
        found.append(round(measure(), 1))
    setattr(forms, limit, before)
    entry = {"form": form, "size": size, "us": found[1], "other_us": found[0]}
    print(entry, flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["prompts", "hot_trained"], help="the others' entries stay as they are")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/tiles.json"))
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU is here: forms are only timed on one.")
    device, dtype = torch.device("cuda"), torch.bfloat16
    base = common.random_base("1.7B", device, dtype, LAYERS)
    attend_causally(base, 512)
    table = json.loads(resources.files("molora_kernels").joinpath("tiles.json").read_text())
    entries = []
    if settings.only != "hot_trained":
        entries += prompts(base)
    if settings.only != "prompts":
        entries += [
            both("hot_trained", "HOT_TRAINED", count * RANK, partial(trained_us, base, count)) for count in TRAINED
        ]
    kept = [entry for entry in table["forms"] if entry["form"] not in {found["form"] for found in entries}]
    write(settings.out, table | {"forms": kept + entries})


def prompts(base: Any) -> list[dict[str, Any]]:
    """The entries of what a prompt chooses."""
    over = {count: fill(base, count, RANK) for count in SLOTS}
    few_and_many = [over[8], over[64]]
    tokens = [both("by_token", "BY_TOKEN", n, partial(prompts_us, base, few_and_many, n, 1)) for n in TOKENS]
    return tokens + [
        both("together", "TOGETHER", count, partial(prompts_us, base, [over[count]], 2048, 2)) for count in SLOTS
    ]


if __name__ == "__main__":
    main()
