"""Tokens a second with many compressed adapters, each sequence with another one, beside ordinary adapters and none.

    python -m benchmarks.compressed_pace --adapters 1000 --batch 1 8 64

The adapters are random, in all linear modules of the starter's base: what they hold changes no time. Beside them stand
as many ordinary ones as have the same bytes, which is fewer. All kinds take turns, and what counts is the median over
the turns of a kind's pace over that of one ordinary adapter in the same turn.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Stack, StackLayer
from molora.adapter import Adapter, LoRAWeights, SharedWeights, total_bytes
from molora.base import DEFAULT_BASE, load_base
from molora.bench import _pace
from molora.checks import linear_sizes
from molora.compose.joint import Basis
from molora_training.report import heading, line

LAYER, PROMPT = "user", 32  # tokens
ONE = "one ordinary adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--basis", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--turns", type=int, default=5, help="of which the median counts")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.bfloat16)
    sizes = {name: size for name, size in linear_sizes(base).items() if "layers." in name}
    one = ordinary(sizes, given.rank)
    many = compressed(sizes, given.rank, given.basis, given.adapters)
    fit = max(2, total_bytes(many) // total_bytes([one]))
    kinds = {
        "base": [],
        ONE: [one],
        f"{fit} ordinary adapters": [ordinary(sizes, given.rank, seed) for seed in range(fit)],
        f"{given.adapters} compressed adapters": many,
    }
    models = {kind: model_with(copy.deepcopy(base), tokenizer, adapters, device) for kind, adapters in kinds.items()}
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        inputs = {kind: inputs_for(model, batch) for kind, model in models.items()}
        for kind, model in models.items():  # captures its steps
            _pace(model.generate, inputs[kind], 8)
        turns = [
            {kind: batch * _pace(model.generate, inputs[kind], given.tokens) for kind, model in models.items()}
            for _ in range(given.turns)
        ]
        for kind, adapters in kinds.items():
            rows.append(
                {
                    "kind": kind,
                    "batch": batch,
                    "tokens a second": round(statistics.median(turn[kind] for turn in turns), 1),
                    "of one adapter's": [round(turn[kind] / turn[ONE], 4) for turn in turns],
                    "bytes of adapters": total_bytes(adapters),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        settings = f"--adapters {given.adapters} --rank {given.rank} --basis {given.basis} --tokens {given.tokens} "
        settings += f"--turns {given.turns} --batch {' '.join(map(str, given.batch))}"
        about = heading(
            f"python -m benchmarks.compressed_pace {settings}", f"prompts of {PROMPT} tokens, answers of {given.tokens}"
        )
        given.out.write_text(json.dumps({**about, "rows": rows, "must": must(rows)}, indent=1) + "\n", encoding="utf-8")


def must(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Compress then Serve (arXiv 2407.00066) reports: four fifths of one adapter's pace."""
    largest = max(row["batch"] for row in rows)
    row = next(row for row in rows if row["batch"] == largest and row["kind"].endswith("compressed adapters"))
    share = statistics.median(row["of one adapter's"])
    return [
        line(
            "pace with all compressed adapters, of that with one ordinary one", share, 0.8, "higher", f"batch {largest}"
        )
    ]


def model_with(base: Any, tokenizer: Any, adapters: list[Adapter], device: str) -> MoLoRAModel:
    stack = Stack([StackLayer(LAYER, default=None)])
    model = MoLoRAModel.from_base(base, stack, tokenizer=tokenizer).to(device)
    for number, adapter in enumerate(adapters):
        model.stack[LAYER].adapters[f"a{number}"] = adapter.path
        model._put(f"{LAYER}/a{number}", model.adapted.pack(adapter))
    model._refresh()
    if adapters:
        check_that_it_acts(model, f"a{len(adapters) - 1}")
    return model


def inputs_for(model: MoLoRAModel, batch: int) -> dict[str, Any]:
    """Prompts of other tokens, their adapters far from each other, as those of users are."""
    ids = torch.randint(3, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    names = list(model.stack[LAYER].adapters)
    chosen = [{LAYER: names[row * len(names) // batch]} if names else {} for row in range(batch)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "selection": chosen}


def check_that_it_acts(model: MoLoRAModel, name: str) -> None:
    """What does not act costs nothing."""
    ids = torch.arange(3, 3 + PROMPT, device=model.device).unsqueeze(0)
    with torch.no_grad():
        plain, own = (model(ids, selection={LAYER: one}).logits for one in (None, name))
    assert plain is not None and own is not None and not torch.equal(plain, own), f"{name} does not act"


def ordinary(sizes: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> Adapter:
    chance = torch.Generator().manual_seed(seed)
    modules = {
        name: LoRAWeights(
            torch.randn(rank, inside, generator=chance).bfloat16(),
            (0.01 * torch.randn(outside, rank, generator=chance)).bfloat16(),
            1.0,
        )
        for name, (inside, outside) in sizes.items()
    }
    return Adapter(Path("ordinary"), modules, {})


def compressed(sizes: dict[str, tuple[int, int]], rank: int, size: int, count: int) -> list[Adapter]:
    chance = torch.Generator().manual_seed(1)
    bases = {
        name: Basis(torch.randn(outside, size, generator=chance), torch.randn(inside, size, generator=chance))
        for name, (inside, outside) in sizes.items()
    }
    return [
        Adapter(
            Path("compressed"),
            {
                name: SharedWeights(
                    basis,
                    (0.01 * torch.randn(rank, size, generator=chance)).bfloat16(),
                    (0.01 * torch.randn(size, rank, generator=chance)).bfloat16(),
                )
                for name, basis in bases.items()
            },
            {},
        )
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
