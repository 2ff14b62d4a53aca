"""Tokens a second with many compressed adapters, each sequence with another one, beside one ordinary adapter and none.

    python -m benchmarks.serve --adapters 1000 --batch 1 8 64

The adapters are random, in all linear modules of the starter's base: what they hold changes no time.
"""

import argparse
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
from molora_training.report import heading

LAYER, PROMPT = "user", 32  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--basis", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--times", type=int, default=3, help="of which the median counts")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.bfloat16)
    sizes = {name: size for name, size in linear_sizes(base).items() if "layers." in name}
    kinds = {
        "base": [],
        "one ordinary adapter": [ordinary(sizes, given.rank)],
        f"{given.adapters} compressed adapters": compressed(sizes, given.rank, given.basis, given.adapters),
    }
    rows: list[dict[str, Any]] = []
    for kind, adapters in kinds.items():
        model = MoLoRAModel.from_base(base, Stack([StackLayer(LAYER, default=None)]), tokenizer=tokenizer).to(device)
        names = [f"a{number}" for number in range(len(adapters))]
        for name, adapter in zip(names, adapters, strict=True):
            model.stack[LAYER].adapters[name] = adapter.path
            model._put(f"{LAYER}/{name}", adapter)
        model._refresh()
        for batch in given.batch:
            ids = torch.randint(3, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
            # Far from each other, as those of users are.
            chosen = [{LAYER: names[row * len(names) // batch]} if names else {} for row in range(batch)]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "selection": chosen}
            paces = [batch * _pace(model.generate, inputs, given.tokens) for _ in range(given.times + 1)][1:]
            rows.append({"kind": kind, "batch": batch, "tokens a second": round(statistics.median(paces), 1)})
            rows[-1]["bytes of adapters"] = total_bytes(adapters)
            print(json.dumps(rows[-1]), flush=True)
        for name in names:
            model._drop(f"{LAYER}/{name}")
    if given.out:
        command = f"python -m benchmarks.serve --adapters {given.adapters} --rank {given.rank} --basis {given.basis}"
        about = heading(command, f"prompts of {PROMPT} tokens, answers of {given.tokens}")
        given.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def ordinary(sizes: dict[str, tuple[int, int]], rank: int) -> Adapter:
    chance = torch.Generator().manual_seed(0)
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
