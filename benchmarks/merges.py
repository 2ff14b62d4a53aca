"""Seconds to merge adapters of the starter's base, by method, on this machine's CPU.

    python -m benchmarks.merges --adapters 8 --rank 16

The adapters are random: what they hold changes only the time of a cut, which may have to be in float64.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch

from molora.base import DEFAULT_BASE, load_base
from molora.checks import linear_sizes
from molora.compose.merge import merge
from molora.compose.methods import Method
from molora.factors import write_factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=list(get_args(Method)), choices=get_args(Method))
    given = parser.parse_args()
    base, _ = load_base(DEFAULT_BASE)
    sizes = {name: size for name, size in linear_sizes(base).items() if "layers." in name}
    del base
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for number in range(given.adapters):
            chance = torch.Generator().manual_seed(number)
            factors = {
                name: (
                    torch.randn(given.rank, inside, generator=chance) * inside**-0.5,
                    torch.randn(outside, given.rank, generator=chance),
                )
                for name, (inside, outside) in sizes.items()
            }
            folders[f"{number}"] = Path(place) / f"{number}"
            write_factors(folders[f"{number}"], factors, DEFAULT_BASE)
        print(
            f"{given.adapters} adapters of rank {given.rank}, {len(sizes)} modules, {torch.get_num_threads()} threads"
        )
        for method in given.methods:
            started = time.perf_counter()
            report = merge(folders, Path(place) / f"merged-{method}", method, at_once=torch.get_num_threads())
            print(f"{method:<20} {time.perf_counter() - started:6.1f} s   error {report.error:.3f}", flush=True)


if __name__ == "__main__":
    main()
