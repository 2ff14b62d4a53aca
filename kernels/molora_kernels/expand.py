"""Grouped expand in Triton: y(t) += sum over k of w(t, k) h(t, k) B_s.

Each program owns its part of y, so nothing is added atomically and a repeated run is bitwise equal. Tokens on which
nothing acts are neither read nor written: they stay the base's bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.blocks import BLOCK, Blocks, add_adapters, early_tiles, plan_rows
from molora_kernels.limits import COUNTS, shared_memory
from molora_kernels.pages import PAGE, PageView
from molora_kernels.rows import add_lora, core_pointers, core_ranks, core_sizes, first_pages, first_rows

LARGEST_PAGES = 4  # that are multiplied at once
STAGES = 3  # of the pipeline over a block's slots
OPERANDS = 16 << 10  # bytes of shared memory that a product's operands take beside the pipeline


@dataclass(frozen=True)
class ExpandTile:
    """How the form by block is cut: columns of the output, slots at once, warps."""

    o: int = 128
    at_once: int = 1
    warps: int = 4


@triton.jit(do_not_specialize=COUNTS)
def _expand_token_kernel(
    y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, columns_ptr,
    pairs, pages, adapters, core_width, core_pages, stride_y, piece_first,
    TOP: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    piece = piece_first + tl.program_id(2)
    # Alignment that the compiler cannot see, and without which each number is loaded alone.
    column = tl.multiple_of(tl.load(columns_ptr + piece), ALIGN)
    width = tl.multiple_of(tl.load(columns_ptr + piece + 1) - column, ALIGN)
    y_column = tl.multiple_of(column - tl.load(columns_ptr + piece_first), ALIGN)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    cores = (core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, core_width, core_pages)
    acc = tl.zeros((BLOCK_O,), tl.float32)
    acts = 0
    for k in tl.static_range(TOP):  # each pair as a token of one slot: a plan may have too many columns for one tile
        pair = token * TOP + k
        if tl.load(slots_ptr + pair) >= 0:
            rows = first_rows(
                o, inside, pair, piece, width, column,
                b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores, 1, 1, FIRST, CORE, PAGE,
            )  # fmt: skip
            acc = add_lora(
                acc, rows, o, inside, pair, piece, width, column, h_ptr, b_ptr, pairs, pages, cores,
                1, 1, FIRST, CORE, SLICES, MAX_PAGES, SPLIT, PAGE,
            )  # fmt: skip
            acts = tl.maximum(acts, tl.max(rows[2], 0))
    if acts > 0:
        y = y_ptr + token * stride_y + y_column + o
        total = tl.load(y, mask=inside, other=0.0).to(tl.float32) + acc
        tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _expand_block_kernel(
    y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, columns_ptr,
    tokens, most, pages, adapters, stride_y, piece_first,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each number of y is read and written once, whatever the columns of the plan."""
    block = tl.program_id(0)
    piece = piece_first + tl.program_id(2)
    column = tl.multiple_of(tl.load(columns_ptr + piece), ALIGN)
    width = tl.multiple_of(tl.load(columns_ptr + piece + 1) - column, ALIGN)
    y_column = tl.multiple_of(column - tl.load(columns_ptr + piece_first), ALIGN)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.program_id(1) * BLOCK_O >= width:
        return
    inside = o < width
    early = early_tiles(
        block, piece, column, width, o, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, most, pages,
        adapters, AT_ONCE, PAGES, PAGE,
    )  # fmt: skip
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order_ptr + place, mask=place < tokens, other=0).to(tl.int64)
    plan = plan_rows(token, place < tokens, slots_ptr, weights_ptr, TOP)
    acts = plan[0][0] >= 0
    for k in tl.static_range(1, TOP):
        acts = acts | (plan[k][0] >= 0)
    y = y_ptr + token[:, None] * stride_y + (y_column + o)[None, :]
    here = acts[:, None] & inside[None, :]
    before = tl.load(y, mask=here, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    acc, _ = add_adapters(
        acc, tl.zeros((1,), tl.float32), early, early, piece, column, o, piece, column, o, width, inside,
        plan, token, block, h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
        False, TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
    )  # fmt: skip
    tl.store(y, (acc + before.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=here)


def block_shape(h: torch.Tensor, pages: PageView, slots: torch.Tensor, at_once: int) -> dict[str, int | bool]:
    """What :func:`molora_kernels.blocks.add_adapters` has to know of h, of the adapters and of the plan."""
    hot = h.dim() == 2
    together = min(LARGEST_PAGES, triton.next_power_of_2(pages.max_pages))
    if h.dtype == torch.float32 and h.is_cuda:  # without tensor cores each page more is code that takes long to compile
        together = 1
    return {
        "TOP": slots.shape[1],
        "SLICES": len(pages.outputs),
        "MAX_PAGES": pages.max_pages,
        "SPLIT": 1 if hot else h.shape[0],
        "HOT": hot,
        "AT_ONCE": max(1, min(at_once, LARGEST_PAGES // together)),
        "PAGES": together,
        "PAGE": PAGE,
    }


def block_stages(
    stages: int, shape: dict[str, int | bool], h: torch.Tensor, b: torch.Tensor, tokens: int, columns: int
) -> int:
    """``stages`` (3) of the pipeline over a block's slots, or 1 where it has no room: a stage holds the pages that are
    multiplied at once, of ``columns`` columns of B and of what ``tokens`` tokens shrank. Triton keeps two of them, over
    the pages of one slot four. shape: of :func:`block_shape`."""
    kept = 4 if shape["MAX_PAGES"] > shape["PAGES"] else 2
    rows = shape["AT_ONCE"] * shape["PAGES"] * PAGE
    of_h = tokens * shape["TOP"] * shape["SPLIT"] * h.element_size()
    needed = kept * rows * (columns * b.element_size() + of_h) + OPERANDS
    return stages if needed <= shared_memory(b.device) else 1


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    pages: PageView,
    slots: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks | None,
    upcast: bool,
    piece: int | None = None,
    tile: ExpandTile = ExpandTile(),
) -> torch.Tensor:
    """Adds to y [T, sum of O] in place.

    Args:
        y: [T, sum of O], rows contiguous; [T, O of the slice] of one ``piece`` alone.
        h: of :func:`molora_kernels.shrink.shrink`, or by block also of ``shrink_hot``, there after
            :func:`molora_kernels.cores.apply_cores` if a slot has a core.
        pages, slots, blocks, upcast: as there.
        weights: [T, S] float32, contiguous.
        piece: the only slice.
        tile: how the form by block is cut.
    """
    T, S = slots.shape
    slices, widest = len(pages.outputs), max(pages.outputs)
    first, acting = (0, slices) if piece is None else (piece, 1)
    if piece is not None:
        widest = pages.outputs[piece]
    align = 16 if all(width % 16 == 0 for width in pages.outputs) else 1
    if blocks is None:
        block, warps = 256, 4
        _expand_token_kernel[(T, triton.cdiv(widest, block), acting)](
            y, h, pages.B, weights, slots, pages.first, pages.count, *core_pointers(pages), pages.columns,
            T * S, pages.pages, pages.slots, *core_sizes(pages), y.stride(0), first,
            TOP=S, FIRST=first_pages(pages, 1, block, warps), CORE=core_ranks(pages),
            SLICES=slices, MAX_PAGES=pages.max_pages, SPLIT=h.shape[0], PAGE=PAGE, ALIGN=align,
            BLOCK_O=block, num_warps=warps,
        )  # fmt: skip
    else:
        shape = block_shape(h, pages, slots, tile.at_once)
        _expand_block_kernel[(len(blocks.counts), triton.cdiv(widest, tile.o), acting)](
            y, h, pages.B, weights, slots, blocks.order, blocks.lists, blocks.counts,
            pages.first, pages.count, pages.columns,
            T, blocks.lists.shape[1], pages.pages, pages.slots, y.stride(0), first,
            **shape, ALIGN=align, BLOCK_T=BLOCK, BLOCK_O=tile.o, UPCAST=upcast, num_warps=tile.warps,
            num_stages=block_stages(STAGES, shape, h, pages.B, BLOCK, tile.o),
        )  # fmt: skip
    return y
