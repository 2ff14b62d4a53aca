"""Grouped shrink in Triton: h(t, k) = x(t) A_s^T for s = slots(t, k), all slices of a group in one launch.

Three forms of one function. By token (few tokens): a program for each (token, k). By block (a prompt): a program for
a block of tokens and a few of the slots that act there. Hot (few adapters): the ranks of all adapters for every token,
one product of the library, for which the choice of slots does not matter and top-k costs what top-1 does.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.blocks import BLOCK, Blocks, slot_rows
from molora_kernels.pages import PAGE, PageView


@dataclass(frozen=True)
class ShrinkTile:
    """How the form by block is cut: elements of the input, parts of its sum, slots at once, warps, pipeline stages."""

    d: int = 64
    split: int = 4
    at_once: int = 1
    warps: int = 4
    stages: int = 3


@triton.jit
def _shrink_token_kernel(
    x_ptr, a_ptr, h_ptr, slots_ptr, first_ptr, count_ptr,
    pairs, width_in, pages, adapters, stride_x,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    part = tl.program_id(1)
    split = tl.program_id(2)
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    if slot < 0:
        return
    piece = part // MAX_PAGES
    page = part % MAX_PAGES
    if page >= tl.load(count_ptr + piece * adapters + slot):
        return
    row = (piece * pages + tl.load(first_ptr + piece * adapters + slot) + page).to(tl.int64) * PAGE
    ranks = tl.arange(0, PAGE)
    x_row = x_ptr + (pair // TOP).to(tl.int64) * stride_x
    acc = tl.zeros((PAGE,), tl.float32)
    for start in range(split * BLOCK_D, width_in, SPLIT * BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row + d, mask=d < width_in, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + (row + ranks)[:, None] * width_in + d[None, :], mask=(d < width_in)[None, :], other=0.0)
        acc += tl.sum(a.to(tl.float32) * x[None, :], 1)
    at = (split * pairs + pair).to(tl.int64) * (SLICES * MAX_PAGES * PAGE)
    tl.store(h_ptr + at + part * PAGE + ranks, acc)


@triton.jit
def _shrink_block_kernel(
    x_ptr, a_ptr, h_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, most, width_in, pages, adapters, stride_x,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    split = tl.program_id(2)
    # Columns of the product: the ranks of all slices of AT_ONCE slots, so that x is read once for all of them.
    COLUMNS: tl.constexpr = SLICES * MAX_PAGES * PAGE
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = (c % COLUMNS) // (MAX_PAGES * PAGE)
    page = (c // PAGE) % MAX_PAGES
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    here = place < tokens
    token = tl.load(order_ptr + place, mask=here, other=0).to(tl.int64)
    slots = slot_rows(token, here, slots_ptr, TOP)
    many = tl.load(counts_ptr + block)
    for i in range(0, many, AT_ONCE):
        at = i + c // COLUMNS
        wanted = (at < many) & (c < AT_ONCE * COLUMNS)
        slot = tl.load(lists_ptr + block.to(tl.int64) * most + at, mask=wanted, other=-1)
        owned = page < tl.load(count_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
        if tl.max(owned.to(tl.int32), 0) > 0:
            first = tl.load(first_ptr + piece * adapters + slot, mask=owned, other=0)
            a_rows = a_ptr + ((piece * pages + first + page).to(tl.int64) * PAGE + c % PAGE) * width_in
            acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for start in range(split * BLOCK_D, width_in, SPLIT * BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                inside = d < width_in
                x = tl.load(
                    x_ptr + token[:, None] * stride_x + d[None, :], mask=here[:, None] & inside[None, :], other=0.0
                )
                a = tl.load(a_rows[None, :] + d[:, None], mask=inside[:, None] & owned[None, :], other=0.0)
                if UPCAST:
                    x, a = x.to(tl.float32), a.to(tl.float32)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            for k in tl.static_range(TOP):
                mine = (slots[k][:, None] == slot[None, :]) & owned[None, :]
                cells = ((split * tokens + token) * TOP + k)[:, None] * COLUMNS + (c % COLUMNS)[None, :]
                tl.store(h_ptr + cells, acc, mask=mine)


def shrink_hot(x: torch.Tensor, pages: PageView) -> torch.Tensor:
    """[T, slices x pages x PAGE] in the dtype of x: the ranks of every page for every token. x: [T, D]."""
    return x @ pages.A.view(-1, pages.inputs).T


def shrink(
    x: torch.Tensor,
    pages: PageView,
    slots: torch.Tensor,
    blocks: Blocks | None,
    tile: ShrinkTile,
    upcast: bool,
    zeros: bool = False,
) -> torch.Tensor:
    """[split, T, S, slices x max_pages x PAGE] float32: partial sums of h, to be added up over ``split``.

    What no adapter reaches is not written: the expand does not read it.

    Args:
        x: [T, D], rows contiguous.
        pages: the adapters.
        slots: [T, S] int32 or int64, contiguous, -1 for none.
        blocks: of :func:`molora_kernels.blocks.make_blocks`; None: the form by token.
        tile: how it is cut; of the form by token only the split counts.
        upcast: multiply in float32 (Triton's interpreter gets half precision wrong).
        zeros: what no adapter reaches is 0 instead.
    """
    T, S = slots.shape
    slices, split = len(pages.outputs), tile.split
    parts = slices * pages.max_pages
    make = torch.zeros if zeros else torch.empty
    h = make(split, T, S, parts * PAGE, dtype=torch.float32, device=x.device)
    shape = {"TOP": S, "SLICES": slices, "MAX_PAGES": pages.max_pages, "SPLIT": split, "PAGE": PAGE}
    if blocks is None:
        _shrink_token_kernel[(T * S, parts, split)](
            x, pages.A, h, slots, pages.first, pages.count,
            T * S, pages.inputs, pages.pages, pages.slots, x.stride(0),
            **shape, BLOCK_D=256, num_warps=4,
        )  # fmt: skip
    else:
        wide = tile.at_once * parts * PAGE
        columns = max(16, min(128, triton.next_power_of_2(wide)))
        _shrink_block_kernel[(len(blocks.counts), triton.cdiv(wide, columns), split)](
            x, pages.A, h, slots, blocks.order, blocks.lists, blocks.counts, pages.first, pages.count,
            T, blocks.lists.shape[1], pages.inputs, pages.pages, pages.slots, x.stride(0),
            **shape, BLOCK_T=BLOCK, BLOCK_D=tile.d, BLOCK_R=columns, AT_ONCE=tile.at_once, UPCAST=upcast,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return h
