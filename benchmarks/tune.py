"""Measures how the products of a decode step are best cut on this GPU and writes the table that they are cut by.

python -m benchmarks.tune --out kernels/molora_kernels/tiles.json
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from molora_kernels.attention import Attention, AttentionTile
from molora_kernels.linear import LinearTile, linear

SHAPES = {  # rows and columns of W
    "1.7B": [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)],
    "8B": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "head": [(151936, 2048)],
}
TOKENS = (1, 8, 16, 32, 64)
BYTES = 1 << 29  # of weights that a timing goes through, so that none of them is still in the L2
PARTS = ("linear", "attention", "blocks")
TABLES = ("linear", "attention", "shrink", "expand")
SHARED = 200 << 10  # bytes of shared memory that a program may have


def candidates(tokens: int) -> Iterator[LinearTile]:
    if tokens == 1:
        for n, k, split, warps in itertools.product((4, 8, 16, 32), (256, 512, 1024, 2048), (1, 2), (2, 4, 8)):
            if 2048 <= n * k <= 16384 and n * k // (warps * 32) in (16, 32, 64, 128):
                yield LinearTile(n, k, split, warps, 2)
    else:
        block = max(16, tokens)
        for n, k, split, warps, stages in itertools.product(
            (16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (4, 8), (3, 5)
        ):
            if (n + block) * k * 2 * stages <= SHARED and 4096 <= n * k <= 16384 and (warps == 4 or n >= 64):
                yield LinearTile(n, k, split, warps, stages)


def run(tokens: int, rows: int, columns: int, tile: LinearTile, copies: int) -> float:
    """Microseconds of one product, the median of replays that go through ``copies`` weights."""
    weights = torch.randn(copies, rows, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    kind = torch.bfloat16 if rows > 65536 else torch.float32
    y = torch.full((tile.split, tokens, rows), torch.nan, device="cuda", dtype=kind)
    linear(y, x, weights[0], tile)
    expected = x.double() @ weights[0].double().T
    error = float((y.double().sum(0) - expected).norm() / expected.norm())
    if not error < 1e-2:
        sys.exit(f"{tile} is wrong at {tokens} x {rows} x {columns}: relative error {error:.1e}.")
    return _replays(lambda index: linear(y, x, weights[index], tile), copies)


def compile_all(part: list[tuple[int, LinearTile]]) -> None:
    for tokens, tile in part:
        x = torch.randn(tokens, 16384, device="cuda", dtype=torch.bfloat16)
        for rows, kind in ((1024, torch.float32), (1024, torch.bfloat16)):
            if kind is torch.float32 or tile.split == 1:
                y = torch.empty(tile.split, tokens, rows, device="cuda", dtype=kind)
                linear(y, x, torch.zeros(rows, 16384, device="cuda", dtype=torch.bfloat16), tile)


def attention_candidates(programs: int) -> Iterator[AttentionTile]:
    for block, parts, warps, stages in itertools.product((64, 128), (1, 2, 4, 8, 16), (4, 8), (2, 3)):
        if 64 <= programs * parts <= 4096 and block * parts <= 1024:
            yield AttentionTile(block, parts, warps, stages)


def run_attention(batch: int, kv_heads: int, context: int, tile: AttentionTile, memory: torch.Tensor) -> float:
    """Microseconds over ``context`` positions, heads of width 128 in pairs, with the programmatic launch of a step."""
    heads, width = 2 * kv_heads, 128
    q = torch.randn(batch, heads, width, device="cuda", dtype=torch.bfloat16)
    out, mask = torch.empty_like(q), torch.ones(batch, memory.shape[4], dtype=torch.bool, device="cuda")
    length = torch.full((1,), context - 1, device="cuda")
    attention = Attention(batch, heads, width, tile, q.device)

    def call(index: int) -> None:
        keys, values = memory[index]
        attention(out, q, keys, values, mask, length, width**-0.5, True)

    return _replays(call, len(memory))


def tune_attention() -> list[dict[str, Any]]:
    entries, kv_heads, context = [], 8, 512
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        memory = torch.randn(max(2, 256 // batch), 2, batch, kv_heads, 1024, 128, device="cuda", dtype=torch.bfloat16)
        memory = memory[:28]
        tiles = list(attention_candidates(batch * kv_heads))
        times = {tile: run_attention(batch, kv_heads, context, tile, memory) for tile in tiles}
        best = min(times, key=lambda tile: times[tile])
        limit = batch * kv_heads * context * 128 * 4 / 3.0e6
        print(f"attention {batch}: {times[best]:.2f} us, limit {limit:.2f}  {tuple(asdict(best).values())}", flush=True)
        entries.append({"programs": batch * kv_heads, "us": round(times[best], 2), "tile": asdict(best)})
    return entries


def tune_blocks() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The forms by block on gate and up of the 1.7B shape, with inputs that are not in the L2."""
    from benchmarks.contenders import make_problem
    from molora_kernels.expand import ExpandTile, expand
    from molora_kernels.order import order_by_slot
    from molora_kernels.shrink import ShrinkTile, shrink

    shrinks = [
        ShrinkTile(t, d, split, warps, stages)
        for t, d, split, warps, stages in itertools.product((16, 32), (128,), (1, 2, 4), (4,), (3,))
    ]
    expands = [ExpandTile(t, o, 4, n) for t, o, n in itertools.product((16, 32, 64), (128, 256), (2, 4, 8))]
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for slots, tokens in ((8, 2048), (64, 2048), (8, 256)):
        problem = make_problem(tokens, 2048, (6144, 6144), slots, 1, 16, "uniform", torch.bfloat16, "cuda")
        order, weights = order_by_slot(problem.slots), problem.weights
        xs = torch.randn(8, tokens, 2048, device="cuda", dtype=torch.bfloat16)
        ys = torch.randn(4, tokens, 6144, device="cuda", dtype=torch.bfloat16)
        p = problem.pages
        times = {}
        for tile in shrinks:
            call = partial(_one_shrink, shrink, xs, p, problem.slots, order, tile)
            # What the expand then reads counts too: a float32 page for each part.
            times[tile] = _replays(call, len(xs)) + tile.split * tokens * 32 * 4 * 12 / 5.0e6 / 2
        best = min(times, key=lambda tile: times[tile])
        h = shrink(xs[0], p, problem.slots, order, best, False)
        spent = {}
        for shape in expands:
            call = partial(_one_expand, expand, ys, h, p, problem.slots, weights, order, shape)
            spent[shape] = _replays(call, len(ys))
        fastest = min(spent, key=lambda tile: spent[tile])
        limit = tokens * 6144 * 4 / 3.0e6
        print(
            f"{slots} slots, {tokens} tokens: shrink {times[best]:.1f} us {tuple(asdict(best).values())}, "
            f"expand {spent[fastest]:.1f} us {tuple(asdict(fastest).values())}, its limit {limit:.1f}",
            flush=True,
        )
        for entries, us, tile in ((found[0], times, best), (found[1], spent, fastest)):
            entries.append({"tokens": tokens, "slots": slots, "us": round(us[tile], 1), "tile": asdict(tile)})
    return found


def _one_shrink(shrink: Any, xs: Any, pages: Any, slots: Any, order: Any, tile: Any, index: int) -> None:
    shrink(xs[index], pages, slots, order, tile, False)


def _one_expand(
    expand: Any, ys: Any, h: Any, pages: Any, slots: Any, weights: Any, order: Any, tile: Any, index: int
) -> None:
    expand(ys[index], h, pages, slots, weights, order, False, 0, tile)


def _product(x: torch.Tensor, weights: torch.Tensor, index: int) -> None:
    x @ weights[index].T


def _replays(call: Any, copies: int) -> float:
    """Median microseconds of one call, captured, going through ``copies`` inputs."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            call(index)
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/tiles.json"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="the rest stays as it is")
    settings = parser.parse_args()
    table = json.loads(resources.files("molora_kernels").joinpath("tiles.json").read_text())
    if "blocks" in settings.only:
        table["shrink"], table["expand"] = tune_blocks()
    if "attention" in settings.only:
        table["attention"] = tune_attention()
    if "linear" in settings.only:
        table["linear"] = tune_linear(settings.shapes, settings.workers)
    parts = [f'"{part}": [\n' + ",\n".join(map(json.dumps, table[part])) + "\n]" for part in TABLES]
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text("{" + ",\n".join([f'"device": "{torch.cuda.get_device_name()}"', *parts]) + "}\n")


def tune_linear(shapes: list[str], workers: int) -> list[dict[str, Any]]:
    work = [(tokens, tile) for tokens in TOKENS for tile in candidates(tokens)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_all, [work[i::workers] for i in range(workers)]))
    entries = []
    for shape in shapes:
        for tokens, (rows, columns) in itertools.product(TOKENS, SHAPES[shape]):
            copies = max(2, min(64, BYTES // (rows * columns * 2)))
            weights = torch.randn(copies, rows, columns, device="cuda", dtype=torch.bfloat16)
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            library = _replays(partial(_product, x, weights), copies)
            del weights
            tiles = [t for t in candidates(tokens) if rows <= 65536 or t.split == 1]
            times = {tile: run(tokens, rows, columns, tile, copies) for tile in tiles}
            best = min(times, key=lambda tile: times[tile])
            entry = {"tokens": tokens, "rows": rows, "columns": columns, "us": round(times[best], 2),
                     "library_us": round(library, 2), "tile": asdict(best)}  # fmt: skip
            entries.append(entry)
            limit = rows * columns * 2 / 3.0e6
            print(f"{tokens:3} x {rows} x {columns}: {times[best]:.2f} us, cuBLAS {library:.2f}, limit {limit:.2f}  "
                  f"{tuple(asdict(best).values())}", flush=True)  # fmt: skip
    return entries


if __name__ == "__main__":
    main()
