"""Grouped expand in Triton: y(t) += sum over k of w(t, k) h(t, k) B_s.

Each program owns its part of y, so nothing is added atomically and a repeated run is bitwise equal. Tokens on which
nothing acts are neither read nor written: they stay the base's bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView

LARGEST_RANKS = 64  # of h that a program keeps in registers


@dataclass(frozen=True)
class ExpandTile:
    """How the form by block is cut: tokens, columns of the output, warps, and how many such pieces of the output a
    program goes through."""

    t: int = 64
    o: int = 128
    warps: int = 4
    pieces: int = 4


@triton.jit
def _expand_token_kernel(
    y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, columns_ptr,
    pairs, pages, adapters, stride_y, piece_first,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    piece = piece_first + tl.program_id(2)
    # Alignment that the compiler cannot see, and without which each number is loaded alone.
    column = tl.multiple_of(tl.load(columns_ptr + piece), ALIGN)
    width = tl.multiple_of(tl.load(columns_ptr + piece + 1) - column, ALIGN)
    y_column = tl.multiple_of(column - tl.load(columns_ptr + piece_first), ALIGN)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    ranks = tl.arange(0, PAGE)
    b_start = column.to(tl.int64) * PAGE * pages
    acc = tl.zeros((BLOCK_O,), tl.float32)
    acts = 0
    for k in tl.static_range(TOP):
        pair = token * TOP + k
        slot = tl.load(slots_ptr + pair).to(tl.int64)
        if slot >= 0:
            count = tl.load(count_ptr + piece * adapters + slot)
            row = tl.load(first_ptr + piece * adapters + slot).to(tl.int64) * PAGE
            weight = tl.load(weights_ptr + pair)
            for page in range(count):
                h = tl.zeros((PAGE,), tl.float32)
                for split in tl.static_range(SPLIT):
                    at = (pair + split * pairs) * (SLICES * MAX_PAGES * PAGE) + (piece * MAX_PAGES + page) * PAGE
                    h += tl.load(h_ptr + at + ranks)
                b = tl.load(
                    b_ptr + b_start + (row + page * PAGE + ranks)[:, None] * width + o[None, :],
                    mask=inside[None, :], other=0.0,
                )  # fmt: skip
                acc += tl.sum(b.to(tl.float32) * (h * weight)[:, None], 0)
                acts = 1
    if acts > 0:
        y = y_ptr + token * stride_y + y_column + o
        total = tl.load(y, mask=inside, other=0.0).to(tl.float32) + acc
        tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(
    h_ptr, pair, weight, mine, r, ranks, piece, tokens,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, RANKS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, RANKS]: ranks ``r`` of h, its parts added up, times the tokens' weights."""
    h = tl.zeros((BLOCK_T, RANKS), tl.float32)
    for split in tl.static_range(SPLIT):
        at = (pair + split * tokens * TOP) * (SLICES * MAX_PAGES * PAGE) + piece * MAX_PAGES * PAGE
        h += tl.load(h_ptr + at[:, None] + r[None, :], mask=mine[:, None] & (r < ranks)[None, :], other=0.0)
    return h * weight[:, None]


@triton.jit
def _expand_block_kernel(
    y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, first_ptr, count_ptr, columns_ptr,
    tokens, pages, adapters, stride_y, piece_first, k,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    RANKS: tl.constexpr, PIECES: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One column of the plan, in which each token has one slot: so slot after slot, h (of ranks up to RANKS) stays in
    registers while the program goes along the output, and each number of y is read and written once."""
    piece = piece_first + tl.program_id(2)
    column = tl.multiple_of(tl.load(columns_ptr + piece), ALIGN)
    width = tl.multiple_of(tl.load(columns_ptr + piece + 1) - column, ALIGN)
    y_column = tl.multiple_of(column - tl.load(columns_ptr + piece_first), ALIGN)
    start = tl.program_id(1) * (PIECES * BLOCK_O)
    if start >= width:
        return
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order_ptr + place, mask=place < tokens, other=0).to(tl.int64)
    pair = token * TOP + k
    r = tl.arange(0, RANKS)
    b_start = column.to(tl.int64) * PAGE * pages
    y_rows = y_ptr + token[:, None] * stride_y + y_column
    NONE: tl.constexpr = 2147483647
    left = tl.load(slots_ptr + pair, mask=place < tokens, other=-1).to(tl.int32)
    left = tl.where(left < 0, NONE, left)
    weight = tl.load(weights_ptr + pair, mask=left < NONE, other=0.0)
    slot = tl.min(left, 0)
    while slot < NONE:
        mine = left == slot
        ranks = tl.load(count_ptr + piece * adapters + slot) * PAGE
        rows = tl.load(first_ptr + piece * adapters + slot).to(tl.int64) * PAGE + r
        b_rows = b_ptr + b_start + rows[:, None] * width
        h = _weighted(
            h_ptr, pair, weight, mine, r, ranks, piece, tokens, TOP, SLICES, MAX_PAGES, SPLIT, RANKS, PAGE, BLOCK_T
        )
        end = tl.minimum(start + PIECES * BLOCK_O, width)
        if ranks == 0:
            end = start  # the slot does not adapt this slice
        for first in range(start, end, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            here = mine[:, None] & (o < width)[None, :]
            y = tl.load(y_rows + o[None, :], mask=here, other=0.0)
            b = tl.load(b_rows + o[None, :], mask=(r < ranks)[:, None] & (o < width)[None, :], other=0.0)
            if UPCAST:
                b = b.to(tl.float32)
            acc = tl.dot(h.to(b.dtype), b, input_precision="ieee")
            if MAX_PAGES * PAGE > RANKS:
                for done in range(RANKS, ranks, RANKS):
                    more = _weighted(
                        h_ptr, pair, weight, mine, done + r, ranks, piece, tokens,
                        TOP, SLICES, MAX_PAGES, SPLIT, RANKS, PAGE, BLOCK_T,
                    )  # fmt: skip
                    b = tl.load(
                        b_rows + done * width + o[None, :],
                        mask=(done + r < ranks)[:, None] & (o < width)[None, :], other=0.0,
                    )  # fmt: skip
                    if UPCAST:
                        b = b.to(tl.float32)
                    acc = tl.dot(more.to(b.dtype), b, acc, input_precision="ieee")
            total = y.to(tl.float32) + acc
            tl.store(y_rows + o[None, :], total.to(y_ptr.dtype.element_ty), mask=here)
        left = tl.where(mine, NONE, left)
        slot = tl.min(left, 0)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    pages: PageView,
    slots: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor | None,
    upcast: bool,
    piece: int | None = None,
    tile: ExpandTile = ExpandTile(),
) -> torch.Tensor:
    """Adds to y [T, sum of O] in place.

    Args:
        y: [T, sum of O], rows contiguous; [T, O of the slice] of one ``piece`` alone.
        h: of :func:`molora_kernels.shrink.shrink`.
        pages, slots, order, upcast: as there.
        weights: [T, S] float32, contiguous.
        piece: the only slice.
        tile: how the form by block is cut.
    """
    split, T, S, _ = h.shape
    slices, widest = len(pages.outputs), max(pages.outputs)
    first, acting = (0, slices) if piece is None else (piece, 1)
    if piece is not None:
        widest = pages.outputs[piece]
    shape: dict[str, int | bool] = {
        "TOP": S,
        "SLICES": slices,
        "MAX_PAGES": pages.max_pages,
        "SPLIT": split,
        "PAGE": PAGE,
    }
    shape["ALIGN"] = 16 if all(width % 16 == 0 for width in pages.outputs) else 1
    found = (pages.first, pages.count, pages.columns)
    if order is None:
        block = 256
        _expand_token_kernel[(T, triton.cdiv(widest, block), acting)](
            y, h, pages.B, weights, slots, *found, T * S, pages.pages, pages.slots, y.stride(0), first,
            **shape, BLOCK_O=block, num_warps=4,
        )  # fmt: skip
    else:
        shape |= {"BLOCK_T": tile.t, "BLOCK_O": tile.o, "UPCAST": upcast, "num_warps": tile.warps}
        sizes = (T, pages.pages, pages.slots, y.stride(0), first)
        blocks = triton.cdiv(T, tile.t)
        ranks = min(LARGEST_RANKS, triton.next_power_of_2(pages.max_pages * PAGE))
        for k in range(S):
            _expand_block_kernel[(blocks, triton.cdiv(widest, tile.pieces * tile.o), acting)](
                y, h, pages.B, weights, slots, order[k], *found, *sizes, k, **shape, RANKS=ranks, PIECES=tile.pieces,
            )  # fmt: skip
    return y
