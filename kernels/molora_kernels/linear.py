"""A decode step's linear modules in Triton: the base's product and the adapters' shrink of a group in one launch.

Few tokens, so the time is that of reading W once. The programs of the shrink stand beside those of the product in one
grid: what adapters cost here is their own bytes, not another launch. Both leave float32 partial sums that the kernel
which reads them adds up (:mod:`molora_kernels.step`), so a product may be split along its input without atomics.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.blocks import BLOCK, Blocks
from molora_kernels.limits import fitting_stages
from molora_kernels.pages import PAGE, PageView


@dataclass(frozen=True)
class LinearTile:
    """How a product is cut: rows of W, columns of W, parts of the input, warps, pipeline stages."""

    n: int = 32
    k: int = 256
    split: int = 1
    warps: int = 4
    stages: int = 3


@triton.jit
def _prefetch(
    w_rows, split, width_in, rows, width_out,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Asks for the first AHEAD lines (of 64 half-precision numbers) of each row, which do not depend on x."""
    line = tl.arange(0, AHEAD) * 64
    k = (line // BLOCK_K * SPLIT + split) * BLOCK_K + line % BLOCK_K
    inside = (rows < width_out)[:, None] & (k < width_in)[None, :]
    lines = w_rows + tl.where(inside, k[None, :], 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _holds(slots, first, piece, first_ptr, count_ptr, adapters):
    """Which of some slots hold the run that begins at page ``first``."""
    owned = tl.load(count_ptr + piece * adapters + slots, mask=slots >= 0, other=0)
    return (owned > 0) & (tl.load(first_ptr + piece * adapters + slots, mask=slots >= 0, other=-1) == first)


@triton.jit
def _shrink_slot(
    x_ptr, a_ptr, h_ptr, slots_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    entry, part, piece, page, cut, tokens, width_in, most, pages, adapters, stride_x,
    TOP: tl.constexpr, PARTS: tl.constexpr, PAGE: tl.constexpr, CUTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, LISTED: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One page of the ``entry``-th slot that acts, for all tokens of its block: A is read once for all of them. LISTED:
    the length of a list where slots may share a run, of which the first that is listed then does the work; else 0."""
    block = entry // most
    at = entry % most
    many = tl.load(counts_ptr + block)
    slot = tl.load(lists_ptr + block.to(tl.int64) * most + at, mask=at < many, other=-1).to(tl.int64)
    acts = slot >= 0
    acts = acts & (page < tl.load(count_ptr + piece * adapters + slot, mask=acts, other=0))
    first = tl.load(first_ptr + piece * adapters + slot, mask=acts, other=0)
    if LISTED > 0:
        i = tl.arange(0, LISTED)
        before = tl.load(lists_ptr + block.to(tl.int64) * most + i, mask=i < tl.minimum(at, many), other=-1)
        acts = acts & (tl.max(_holds(before, first, piece, first_ptr, count_ptr, adapters).to(tl.int32), 0) == 0)
    ranks = tl.arange(0, PAGE)
    row = (piece * pages + first + page).to(tl.int64) * PAGE
    rows = a_ptr + (row + ranks)[:, None] * width_in
    if PDL:
        lines = cut * BLOCK_D + tl.arange(0, (BLOCK_D + 63) // 64) * 64
        early = rows + tl.where((lines < width_in)[None, :] & acts, lines[None, :], 0)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [early.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
        gdc_launch_dependents()
    if acts:
        token = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        here = token < tokens
        acc = tl.zeros((BLOCK_T, PAGE), tl.float32)
        for start in range(cut * BLOCK_D, tl.minimum((cut + 1) * BLOCK_D, width_in), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < width_in
            x = tl.load(x_ptr + token[:, None] * stride_x + k[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            a = tl.load(rows + k[None, :], mask=inside[None, :], other=0.0)
            if UPCAST:
                x, a = x.to(tl.float32), a.to(tl.float32)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        for column in tl.static_range(TOP):
            its = tl.load(slots_ptr + token * TOP + column, mask=here, other=-1)
            mine = its == slot
            if LISTED > 0:
                mine = _holds(its, first, piece, first_ptr, count_ptr, adapters)
            cells = ((cut * tokens + token) * TOP + column)[:, None] * (PARTS * PAGE) + (part * PAGE + ranks)[None, :]
            tl.store(h_ptr + cells, acc, mask=mine[:, None])


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, y_ptr, a_ptr, h_ptr, slots_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, width_in, width_out, tiles, blocks, most, shrinks, pages, adapters, stride_x,
    ADAPTED: tl.constexpr, BY_SLOT: tl.constexpr, SHRINK_K: tl.constexpr, LIST_T: tl.constexpr, LISTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, PAGE: tl.constexpr,
    CUTS: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, SHRINK_FIRST: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    PARTS: tl.constexpr = SLICES * MAX_PAGES
    products = tiles * blocks * SPLIT
    if not ADAPTED:
        shrinks = 0
    # A few shrinks begin at once beside the product; many would keep it waiting, and go last.
    if SHRINK_FIRST:
        place = program - shrinks
    else:
        place = program
        program = program - products
        program = tl.where(program < 0, shrinks, program)
    if program < shrinks:
        # The plan was written before the kernel before this one, and factors are constants: both are read early.
        part = program % PARTS
        piece = part // MAX_PAGES
        page = part % MAX_PAGES
        cut = (program // PARTS) % CUTS
        if BY_SLOT:
            _shrink_slot(
                x_ptr, a_ptr, h_ptr, slots_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
                program // (PARTS * CUTS), part, piece, page, cut, tokens, width_in, most, pages, adapters, stride_x,
                TOP, PARTS, PAGE, CUTS, BLOCK_D, SHRINK_K, LIST_T, LISTED, UPCAST, PDL,
            )  # fmt: skip
        else:
            pair = program // (PARTS * CUTS)
            slot = tl.load(slots_ptr + pair).to(tl.int64)
            acts = slot >= 0
            acts = acts & (page < tl.load(count_ptr + piece * adapters + slot, mask=acts, other=0))
            first = tl.load(first_ptr + piece * adapters + slot, mask=acts, other=0)
            ranks = tl.arange(0, PAGE)
            row = (piece * pages + first + page).to(tl.int64) * PAGE
            d = cut * BLOCK_D + tl.arange(0, BLOCK_D)
            a = tl.load(
                a_ptr + (row + ranks)[:, None] * width_in + d[None, :], mask=(d < width_in)[None, :] & acts, other=0.0
            )
            if PDL:
                gdc_wait()
                gdc_launch_dependents()
            if acts:
                x = tl.load(x_ptr + (pair // TOP).to(tl.int64) * stride_x + d, mask=d < width_in, other=0.0)
                own = tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)
                tl.store(h_ptr + (cut * tokens * TOP + pair).to(tl.int64) * (PARTS * PAGE) + part * PAGE + ranks, own)
    else:
        tile = place % tiles
        split = (place // tiles) % SPLIT
        block = place // (tiles * SPLIT)
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + rows.to(tl.int64)[:, None] * width_in
        if PDL:
            if AHEAD > 0:
                _prefetch(w_rows, split, width_in, rows, width_out, SPLIT, BLOCK_N, BLOCK_K, AHEAD)
            gdc_wait()
            gdc_launch_dependents()
        if DOT:
            t = block * BLOCK_T + tl.arange(0, BLOCK_T)
            acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for start in range(split * BLOCK_K, width_in, SPLIT * BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                if EVEN:
                    w = tl.load(w_rows + k[None, :])
                    x = tl.load(x_ptr + t[None, :] * stride_x + k[:, None], mask=(t < tokens)[None, :], other=0.0)
                else:
                    inside = k < width_in
                    w = tl.load(w_rows + k[None, :], mask=(rows < width_out)[:, None] & inside[None, :], other=0.0)
                    x = tl.load(
                        x_ptr + t[None, :] * stride_x + k[:, None],
                        mask=(t < tokens)[None, :] & inside[:, None], other=0.0,
                    )  # fmt: skip
                if UPCAST:
                    w, x = w.to(tl.float32), x.to(tl.float32)
                acc = tl.dot(w, x, acc, input_precision="ieee")
            at = (split * tokens + t).to(tl.int64)[None, :] * width_out + rows[:, None]
            tl.store(
                y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(rows < width_out)[:, None] & (t < tokens)[None, :]
            )
        else:  # one token
            total = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(split * BLOCK_K, width_in, SPLIT * BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                if EVEN:
                    w = tl.load(w_rows + k[None, :])
                    x = tl.load(x_ptr + block * stride_x + k)
                else:
                    w = tl.load(
                        w_rows + k[None, :], mask=(rows < width_out)[:, None] & (k < width_in)[None, :], other=0.0
                    )
                    x = tl.load(x_ptr + block * stride_x + k, mask=k < width_in, other=0.0)
                total += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
            at = (split * tokens + block).to(tl.int64) * width_out + rows
            tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=rows < width_out)


AHEAD = 16  # lines of each row of W that are asked for before x is there
FIRST_SHRINKS = 132  # programs of the shrink that may go before the product: one for each multiprocessor of an H100
SHRINK_BLOCK = 512  # more of them in registers, and fewer programs of the product fit beside
FEW = 16  # tokens; where there are more, so are the parts of the sum that are read again, and half as many are better


def shrink_block(tokens: int, columns: int) -> int:
    """Elements of the input in one program of the shrink: all are asked for at once. There are
    cdiv(columns, shrink_block(tokens, columns)) parts of the sum."""
    block = SHRINK_BLOCK * (1 if tokens <= FEW else 2) * (1 if columns <= 8192 else 2)
    return max(16, min(block, triton.next_power_of_2(columns)))


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: LinearTile,
    h: torch.Tensor | None = None,
    pages: PageView | None = None,
    slots: torch.Tensor | None = None,
    pdl: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """y[s] += over the parts s: y = x W^T; and h, the adapters' shrink of x, as :func:`molora_kernels.shrink.shrink`.

    Args:
        y: [tile.split, T, O], written.
        x: [T, D], rows contiguous.
        weight: [O, D], contiguous, in the dtype of x.
        tile: how it is cut.
        h: [cuts, T, S, slices x pages x PAGE] float32, written where an adapter acts; None: no adapters.
        pages: the adapters.
        slots: [T, S] int32, contiguous, -1 for none.
        pdl: launch as a programmatic dependent of the kernel before (Hopper).
        blocks: of the tokens as they come, their lists written before the kernel before: the shrink then goes by slot,
            for all tokens of a block; None: by token.
    """
    T, D = x.shape
    N = weight.shape[0]
    dot = T > 1
    block_t = max(16, min(64, triton.next_power_of_2(T))) if dot else 1
    tiles, token_blocks = triton.cdiv(N, tile.n), triton.cdiv(T, block_t)
    adapted = h is not None and pages is not None and slots is not None
    programs, cuts, top, slices, most_pages = tiles * token_blocks * tile.split, 1, 1, 1, 1
    block_d, shrinks, most = shrink_block(T, D), 0, 1
    found = (x,) * 7
    if adapted:
        assert h is not None and pages is not None and slots is not None
        cuts, top, slices, most_pages = h.shape[0], slots.shape[1], len(pages.outputs), pages.max_pages
        entries, lists = T * top, (slots, slots)
        if blocks is not None:
            most, lists = blocks.lists.shape[1], (blocks.lists, blocks.counts)
            entries = most * len(blocks.counts)
        shrinks = entries * slices * most_pages * cuts
        programs += shrinks
        found = (pages.A, h, slots, *lists, pages.first, pages.count)
    stages = (
        fitting_stages(tile.stages, (tile.n + block_t) * tile.k * x.element_size(), x.device) if dot else tile.stages
    )
    extra = {"launch_pdl": True} if pdl else {}
    _linear_kernel[(programs,)](
        x, weight, y, *found, T, D, N, tiles, token_blocks, most, shrinks,
        pages.pages if pages is not None else 0, pages.slots if pages is not None else 0, x.stride(0),
        ADAPTED=adapted, BY_SLOT=blocks is not None, SHRINK_K=min(128, block_d),
        LIST_T=min(BLOCK, max(16, triton.next_power_of_2(T))),
        LISTED=triton.next_power_of_2(most) if pages is not None and pages.cores is not None else 0,
        TOP=top, SLICES=slices, MAX_PAGES=most_pages, PAGE=PAGE, CUTS=cuts, BLOCK_D=block_d, AHEAD=AHEAD,
        SHRINK_FIRST=shrinks <= FIRST_SHRINKS,
        SPLIT=tile.split, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_T=block_t,
        EVEN=N % tile.n == 0 and D % (tile.k * tile.split) == 0, DOT=dot, UPCAST=x.device.type == "cpu", PDL=pdl,
        num_warps=tile.warps, num_stages=stages, **extra,
    )  # fmt: skip
