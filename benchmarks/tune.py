"""Measures how products are best cut on this GPU and writes the table that they are cut by.

python -m benchmarks.tune --out kernels/molora_kernels/tiles.json       # and then benchmarks.forms
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

from molora_kernels import epilogue_block
from molora_kernels.attention import Attention, AttentionTile
from molora_kernels.epilogue import Added
from molora_kernels.expand import ExpandTile, expand
from molora_kernels.linear import LinearTile, linear
from molora_kernels.order import PagedPlan
from molora_kernels.pages import PAGE, RankPages
from molora_kernels.shrink import ShrinkTile, shrink, shrink_hot
from molora_kernels.tiles import LARGEST_HOT, EpilogueTile, hot

SHAPES = {  # rows and columns of W
    "1.7B": [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)],
    "8B": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "head": [(151936, 2048)],
}
TOKENS = (1, 8, 16, 32, 64)
BYTES = 1 << 29  # of weights that a timing goes through, so that none of them is still in the L2
PARTS = ("linear", "attention", "blocks")
TABLES = ("linear", "attention", "shrink", "expand", "epilogue", "hot", "forms")
BLOCK_PROBLEMS = (  # tokens, slots, columns of the plan
    (2048, 8, 1),
    (2048, 8, 2),
    (2048, 64, 1),
    (2048, 1024, 1),
    (256, 8, 1),
    (256, 64, 1),
)  # of more slots each column of a plan is added by itself
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
    length = torch.full((batch,), context - 1, device="cuda")
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


def block_candidates() -> tuple[list[ShrinkTile], list[ExpandTile], list[EpilogueTile]]:
    """Of the forms by block."""
    pipelines = ((256, 3), (256, 5), (512, 3))  # elements of the input, stages
    shrinks = [ShrinkTile(16, d, n, 4, stages) for (d, stages), n in itertools.product(pipelines, (1, 2, 4))]
    expands = [ExpandTile(128, n, 4) for n in (1, 2, 4)]
    cuts = [(64, 4, 1), (64, 4, 3), (32, 2, 1), (32, 4, 1)]  # tokens, warps, stages
    epilogues = [EpilogueTile(t, n, warps, stages) for (t, warps, stages), n in itertools.product(cuts, (1, 2, 4))]
    return shrinks, expands, epilogues


GATE_UP, QKV = (6144, 6144), (2048, 1024, 1024)  # columns of the 1.7B shape
SHRINKS = ((2048, QKV), (2048, (2048,)), (2048, GATE_UP), (6144, (2048,)))  # a layer's groups


def block_problem(
    tokens: int, slots: int, top: int, outputs: tuple[int, ...] = GATE_UP, inputs: int = 2048
) -> tuple[RankPages, PagedPlan]:
    """A group of the 1.7B shape, rank 16, tokens spread evenly; the pages are filled as they are."""
    pages = RankPages(inputs, outputs, slots, slots, PAGE, torch.bfloat16, torch.device("cuda"))
    pages.A.normal_(0, 0.02)
    pages.B.normal_(0, 0.02)
    pages.first.copy_(torch.arange(slots, dtype=torch.int32).expand_as(pages.first))
    pages.count.fill_(1)
    chosen = torch.ones(slots, device="cuda").expand(tokens, -1).multinomial(top).int()
    return pages, PagedPlan(chosen, torch.rand(tokens, top, device="cuda") + 0.5)


def tune_blocks(workers: int) -> dict[str, list[dict[str, Any]]]:
    """The forms by block, with inputs that are not in the L2, and whether few adapters shrink hot."""
    shrinks, expands, epilogues = block_candidates()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_blocks, range(workers), itertools.repeat(workers)))
    found: dict[str, list[dict[str, Any]]] = {"shrink": [], "expand": [], "epilogue": [], "hot": []}
    for tokens, slots, top in BLOCK_PROBLEMS:
        pages, plan = block_problem(tokens, slots, top)
        xs = torch.randn(8, tokens, 2048, device="cuda", dtype=torch.bfloat16)
        ys = torch.randn(4, tokens, sum(pages.outputs), device="cuda", dtype=torch.bfloat16)
        attention = Heads(tokens, block_problem(tokens, slots, top, QKV)[0])
        layer = [block_problem(tokens, slots, top, outputs, inputs)[0] for inputs, outputs in SHRINKS]
        read = [xs, xs, xs, torch.randn(4, tokens, 6144, device="cuda", dtype=torch.bfloat16)]
        one = {tile: _replays(partial(_shrinks, read, layer, plan, tile), 4) for tile in shrinks}
        best = min(one, key=lambda tile: one[tile])
        rows = len(pages.outputs) * slots * PAGE
        h, own = (
            shrink_hot(xs[0], of) if hot(tokens, rows) else shrink(xs[0], of, plan.slots, plan.blocks, best, False)
            for of in (pages, attention.pages)
        )
        between = partial(_between, ys, attention, pages, plan)
        two = {tile: between(tile, h, own) for tile in epilogues}
        last = min(two, key=lambda tile: two[tile])
        what = {"tokens": tokens, "slots": slots}
        found["epilogue"].append({**what, "top": top, "us": round(two[last], 1), "tile": asdict(last)})
        base = _replays(partial(_base_gate, ys), len(ys)) + _replays(partial(attention, None, plan, EpilogueTile()), 4)
        print("epilogue", found["epilogue"][-1], f"base {base:.1f}", flush=True)
        if top > 1:
            continue
        h = shrink(xs[0], pages, plan.slots, plan.blocks, best, False)
        three = {tile: _replays(partial(_one_expand, ys, h, pages, plan, tile), len(ys)) for tile in expands}
        fastest = min(three, key=lambda tile: three[tile])
        for kind, us, tile in (("shrink", one, best), ("expand", three, fastest)):
            found[kind].append({**what, "us": round(us[tile], 1), "tile": asdict(tile)})
            print(kind, found[kind][-1], flush=True)
        if rows <= LARGEST_HOT:
            warm = _replays(partial(_shrinks, read, layer, plan, None), 4)
            warm += between(last, shrink_hot(xs[0], pages), shrink_hot(xs[0], attention.pages))
            own = shrink(xs[0], attention.pages, plan.slots, plan.blocks, best, False)
            cold = one[best] + between(last, h, own)
            entry = {"tokens": tokens, "rows": rows, "us": round(cold, 1), "hot_us": round(warm, 1), "hot": warm < cold}
            print("hot", entry, flush=True)
            found["hot"].append(entry)
    return found


def compile_blocks(part: int, parts: int) -> None:
    shrinks, expands, epilogues = block_candidates()
    y = torch.zeros(1, 2048, 12288, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for slots, top in ((8, 1), (8, 2), (64, 1)):  # numbers that 16 divides are compiled apart
        pages, plan = block_problem(2048, slots, top)
        for inputs, outputs in SHRINKS:
            group, wide = block_problem(2048, slots, top, outputs, inputs)[0], x.new_zeros(2048, inputs)
            for tile in shrinks[part::parts]:
                shrink(wide, group, plan.slots, plan.blocks, tile, False)
        by_block = torch.zeros(1, 2048, top, 2 * PAGE, device="cuda", dtype=torch.bfloat16)
        for h in (by_block, shrink_hot(x, pages)):
            for shape in expands[part::parts] if top == 1 else ():
                _one_expand(y, h, pages, plan, shape, 0)
            for cut in epilogues[part::parts]:
                _one_gate(y, h, pages, plan, cut, 0)
        attention = Heads(2048, block_problem(2048, slots, top, QKV)[0])
        by_block = torch.zeros(1, 2048, top, 3 * PAGE, device="cuda", dtype=torch.bfloat16)
        for h in (by_block, shrink_hot(x, attention.pages)):
            for cut in epilogues[part::parts]:
                attention(h, plan, cut, 0)


class Heads:
    """What stands between the product of q, k and v and attention, of one prompt: 16 heads of width 128 and 8."""

    def __init__(self, tokens: int, pages: RankPages) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        self.pages, self.ys, self.q = pages, randn(4, tokens, sum(QKV)), randn(1, tokens, 16, 128)
        self.cache, self.norms = randn(2, 1, 8, tokens, 128), (randn(128), randn(128), 1e-6)
        self.rotary = (randn(tokens, 64).float(), randn(tokens, 64).float())
        self.positions = torch.arange(tokens, device="cuda")
        self.length = torch.zeros(1, dtype=torch.int64, device="cuda")

    def __call__(self, h: torch.Tensor | None, plan: PagedPlan, tile: EpilogueTile, index: int) -> None:
        """h: of the adapters' shrink; None: there are none."""
        epilogue_block.epilogue_tile = lambda *_: tile  # type: ignore[assignment]
        added = None if h is None else Added(h, self.pages, plan.slots, plan.weights, plan.blocks)
        epilogue_block.heads(
            self.ys[index : index + 1], None, self.q, self.cache[0], self.cache[1], self.norms, self.rotary,
            self.positions, self.length, added, None,
        )  # fmt: skip


def _shrinks(
    xs: list[torch.Tensor], layer: list[RankPages], plan: PagedPlan, tile: ShrinkTile | None, index: int
) -> None:
    """Those of a layer's groups; hot without a tile."""
    for x, pages in zip(xs, layer, strict=True):
        if tile is None:
            shrink_hot(x[index], pages)
        else:
            shrink(x[index], pages, plan.slots, plan.blocks, tile, False)


def _one_expand(
    ys: torch.Tensor, h: torch.Tensor, pages: RankPages, plan: PagedPlan, tile: ExpandTile, index: int
) -> None:
    expand(ys[index], h, pages, plan.slots, plan.weights, plan.blocks, False, tile=tile)


def _one_gate(
    ys: torch.Tensor, h: torch.Tensor, pages: RankPages, plan: PagedPlan, tile: EpilogueTile, index: int
) -> None:
    epilogue_block.epilogue_tile = lambda *_: tile  # type: ignore[assignment]
    m = torch.empty(ys.shape[1], ys.shape[2] // 2, device="cuda", dtype=torch.bfloat16)
    epilogue_block.gate(ys[index : index + 1], m, Added(h, pages, plan.slots, plan.weights, plan.blocks), None)


def _between(
    ys: torch.Tensor, attention: "Heads", pages: RankPages, plan: PagedPlan, tile: EpilogueTile, h: torch.Tensor,
    own: torch.Tensor,
) -> float:  # fmt: skip
    """Microseconds of ``gate`` and ``heads`` together, of their shrinks ``h`` and ``own``."""
    us = _replays(partial(_one_gate, ys, h, pages, plan, tile), len(ys))
    return us + _replays(partial(attention, own, plan, tile), len(attention.ys))


def _base_gate(ys: torch.Tensor, index: int) -> None:
    epilogue_block.epilogue_tile = lambda *_: EpilogueTile()  # type: ignore[assignment]
    m = torch.empty(ys.shape[1], ys.shape[2] // 2, device="cuda", dtype=torch.bfloat16)
    epilogue_block.gate(ys[index : index + 1], m, None, None)


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
        table |= tune_blocks(settings.workers)
    if "attention" in settings.only:
        table["attention"] = tune_attention()
    if "linear" in settings.only:
        table["linear"] = tune_linear(settings.shapes, settings.workers)
    write(settings.out, table)


def write(out: Path, table: dict[str, Any]) -> None:
    """An entry a line, and on which GPU they were measured."""
    parts = [f'"{part}": [\n' + ",\n".join(map(json.dumps, table[part])) + "\n]" for part in TABLES]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{" + ",\n".join([f'"device": "{torch.cuda.get_device_name()}"', *parts]) + "}\n")


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
