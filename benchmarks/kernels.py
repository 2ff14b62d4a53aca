"""Time of one layer's adapters over its base GEMMs, ours beside what people use instead, in one run on one GPU.

python -m benchmarks.kernels --out runs/gpu/kernels.csv
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.contenders import CONTENDERS, Problem, exact, make_problem
from molora_kernels.order import order_by_slot

LAYERS = {  # modules that share an input: (in, (out, ...))
    "1.7B": {
        "qkv": (2048, (2048, 1024, 1024)),
        "o": (2048, (2048,)),
        "gate/up": (2048, (6144, 6144)),
        "down": (6144, (2048,)),
    },
    "8B": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate/up": (4096, (12288, 12288)),
        "down": (12288, (4096,)),
    },
}
TOLERANCE = 1e-2  # of the norm, bf16
READ_BYTES_A_US = 3.0e6  # what an H100 reads in a microsecond
DENSE_RANKS = 4096  # more joined ranks than that, and dense is not run
L2_BYTES = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/kernels.csv"), help="CSV, a line for each timing")
    parser.add_argument("--shape", choices=list(LAYERS), default="1.7B")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--top", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--popularity", nargs="+", default=["uniform"], choices=["uniform", "zipf", "identical"])
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU is here: kernels are only timed on one.")
    clock = Clock()
    rows = []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us over the base GEMMs of a {settings.shape} layer"
    )
    for K in settings.adapters:
        for T in settings.tokens:
            for S in settings.top:
                for popularity in settings.popularity:
                    row = measure_layer(clock, settings.shape, K, T, S, settings.rank, popularity)
                    rows.append(row)
                    print(_shown(row), flush=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with settings.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure_layer(
    clock: "Clock", shape: str, K: int, T: int, S: int, rank: int, popularity: str
) -> dict[str, str | int | float]:
    """Microseconds of the base GEMMs, of the order, and of each contender, summed over a layer's groups."""
    total: dict[str, float] = dict.fromkeys(["base", "limit", *CONTENDERS], 0.0)
    for D, outputs in LAYERS[shape].values():
        problem = make_problem(T, D, outputs, K, S, rank, popularity, torch.bfloat16, "cuda")
        weight = torch.randn(sum(outputs), D, device="cuda", dtype=torch.bfloat16)
        total["base"] += clock(lambda x=problem.x, w=weight: x @ w.T)
        total["limit"] += limit_us(problem)
        for name, contender in CONTENDERS.items():
            if name == "dense" and K * rank * len(outputs) > DENSE_RANKS:
                total[name] = float("nan")
                continue
            check(name, problem, contender)
            total[name] += clock(contender(problem))
    order = clock(lambda: order_by_slot(problem.slots))
    return {"shape": shape, "adapters": K, "tokens": T, "top": S, "rank": rank, "popularity": popularity,
            "order": order, **total}  # fmt: skip


def check(name: str, problem: Problem, contender: Callable[[Problem], Callable[[], torch.Tensor]]) -> None:
    """Stops everything when a contender is wrong: a wrong kernel has no speed."""
    before, expected = problem.y.clone(), exact(problem)
    found = contender(problem)().double()
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        sys.exit(f"{name} is wrong: relative error {error:.2e} at {tuple(problem.x.shape)}. Nothing is printed.")
    problem.y.copy_(before)


def limit_us(problem: Problem) -> float:
    """The bytes that have to move, over the memory's pace: the adapters that act, x, and y twice."""
    acting = len(problem.slots.unique())
    numbers = acting * problem.rank * (len(problem.outputs) * problem.x.shape[1] + sum(problem.outputs))
    numbers += problem.x.numel() + 2 * problem.y.numel()
    return numbers * problem.x.element_size() / READ_BYTES_A_US


class Clock:
    """Median microseconds of a captured call, with a cold L2."""

    def __init__(self, repeats: int = 30) -> None:
        self.repeats = repeats
        self.trash = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], torch.Tensor]) -> float:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return statistics.median(self._times(graph))

    def _times(self, graph: torch.cuda.CUDAGraph) -> Iterator[float]:
        for _ in range(self.repeats):
            self.trash.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            yield start.elapsed_time(end) * 1e3


def _shown(row: dict[str, str | int | float]) -> str:
    best = min(float(row[name]) for name in CONTENDERS if not name.startswith("ours") and row[name] == row[name])
    ours = min(float(row[name]) for name in CONTENDERS if name.startswith("ours"))
    times = "  ".join(f"{name} {float(row[name]):.0f}" for name in ("base", "limit", "order", *CONTENDERS))
    what = f"K {row['adapters']} T {row['tokens']} top {row['top']} {row['popularity']}"
    return f"{what}: {times}  | {best / ours:.2f} times as fast as the best peer"


if __name__ == "__main__":
    main()
