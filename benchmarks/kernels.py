"""Time of one layer's adapters over its base GEMMs, ours beside what people use instead, in one run on one GPU.

    python -m benchmarks.kernels --out runs/gpu/kernels.csv
    python -m benchmarks.plots runs/gpu                            # draws it
    TRITON_INTERPRET=1 python -m benchmarks.kernels --device cpu --shape tiny --adapters 4 --tokens 5   # does it run?

Each contender is checked against float64 before it is timed. All run from a captured graph with a cold L2, but the loop
in plain torch, which waits on the host, and so is timed as it is called.
"""

import argparse
import csv
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.contenders import CONTENDERS, EAGER, OPTIONAL, Problem, exact, make_problem
from molora_kernels.order import PagedPlan

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
    "tiny": {"qkv": (64, (64, 32, 32)), "down": (96, (64,))},
}
TOLERANCE = 1e-2  # of the norm, bf16
READ_BYTES_A_US = 3.0e6  # what an H100 reads in a microsecond
DENSE_RANKS = 4096  # more joined ranks than that, and dense is not run
GROUPS = 1024  # more groups than that, torch.nn.functional.grouped_mm refuses
LOOP_ADAPTERS = 64  # more adapters than that, and no loop over them is run: it takes tens of milliseconds
L2_BYTES = 256 << 20

Row = dict[str, str | int | float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/kernels.csv"), help="CSV, a line for each timing")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--top", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--popularity", nargs="+", default=["uniform"], choices=["uniform", "zipf", "identical"])
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    parser.add_argument(
        "--contenders", nargs="+", default=[*CONTENDERS, *found], choices=[*CONTENDERS, *OPTIONAL],
        help="default: all that are installed",
    )  # fmt: skip
    settings = parser.parse_args()
    device = common.check_device(settings)
    clock, rows = Clock(device), []
    name = common.device_name(device)
    print(f"{name}, torch {torch.__version__}; us over the base GEMMs of a {settings.shape} layer")
    for K in settings.adapters:
        for T in settings.tokens:
            for S in settings.top:
                for popularity in settings.popularity:
                    row = measure_layer(
                        clock, settings.shape, K, T, S, settings.rank, popularity, settings.contenders
                    )  # fmt: skip
                    rows.append({**row, "device": name})
                    save(settings.out, rows)
                    print(_shown(row, settings.contenders), flush=True)


def save(out: Path, rows: list[Row]) -> None:
    """Writes what is measured so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure_layer(
    clock: "Clock", shape: str, K: int, T: int, S: int, rank: int, popularity: str, names: list[str]
) -> Row:
    """Microseconds of the base GEMMs, of the order, and of each contender (NaN: not run), summed over a layer's
    groups."""
    device, dtype = clock.device, common.compute_dtype(clock.device)
    total: dict[str, float] = dict.fromkeys(["base", "limit", *names], 0.0)
    for D, outputs in LAYERS[shape].values():
        problem = make_problem(T, D, outputs, K, S, rank, popularity, dtype, device.type)
        weight = torch.randn(sum(outputs), D, device=device, dtype=dtype)
        total["base"] += clock(lambda x=problem.x, w=weight: x @ w.T)
        total["limit"] += limit_us(problem)
        for name in names:
            if not runs(name, K, rank * len(outputs), device):
                total[name] = math.nan
                continue
            contender = (CONTENDERS | OPTIONAL)[name]
            check(name, problem, contender)
            total[name] += clock(contender(problem), eager=name in EAGER)
    order = clock(lambda: PagedPlan(problem.slots.int(), problem.weights).blocks.order)
    return {"shape": shape, "adapters": K, "tokens": T, "top": S, "rank": rank, "popularity": popularity,
            "order": order, **total}  # fmt: skip


def runs(name: str, K: int, ranks: int, device: torch.device) -> bool:
    """Whether a contender takes ``K`` adapters, of ``ranks`` ranks in a group of modules, and ends in good time."""
    if name == "dense":
        return K * ranks <= DENSE_RANKS
    if name in ("grouped_mm", "megablocks") and device.type == "cuda":
        return K < GROUPS
    return name not in EAGER or K <= LOOP_ADAPTERS


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
    """Median microseconds of a call with a cold L2, captured or as it is called; on a CPU of one call."""

    def __init__(self, device: torch.device, repeats: int = 30) -> None:
        self.device, self.repeats = device, repeats
        self.trash = torch.empty(L2_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], torch.Tensor], eager: bool = False) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        if eager:
            return statistics.median(self._time(call) for _ in range(self.repeats // 3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return statistics.median(self._time(graph.replay) for _ in range(self.repeats))

    def _time(self, call: Callable[[], object]) -> float:
        self.trash.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def _shown(row: Row, names: list[str]) -> str:
    times = "  ".join(f"{name} {float(row[name]):.0f}" for name in ("base", "limit", "order", *names))
    what = f"K {row['adapters']} T {row['tokens']} top {row['top']} {row['popularity']}: {times}"
    peers = [float(row[name]) for name in names if not name.startswith("ours") and row[name] == row[name]]
    ours = [float(row[name]) for name in names if name.startswith("ours")]
    if not (peers and ours):
        return what
    return f"{what}  | {min(peers) / min(ours):.2f} times as fast as the best peer"


if __name__ == "__main__":
    main()
