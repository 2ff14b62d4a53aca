"""Grouped shrink in Triton: h(t, k) = x(t) A_s^T for s = slots(t, k), all slices of a group in one launch.

Two forms of one function. By token (decode): a program for each (token, k), no order needed. By block (prefill): a
program for a block of tokens that were ordered by slot; it loops over the slots that occur in its block, so its work is
bounded by the tokens that are there, and any order gives the same result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView


@dataclass(frozen=True)
class ShrinkTile:
    """How the form by block is cut: tokens, elements of the input, parts of its sum, warps, pipeline stages."""

    t: int = 64
    d: int = 64
    split: int = 4
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
    x_ptr, a_ptr, h_ptr, slots_ptr, order_ptr, first_ptr, count_ptr,
    tokens, width_in, pages, adapters, stride_x,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Columns of h: the ranks of all slices, so that x is read once for all of them.
    COLUMNS: tl.constexpr = SLICES * MAX_PAGES * PAGE
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(2) // SPLIT
    split = tl.program_id(2) % SPLIT
    piece = c // (MAX_PAGES * PAGE)
    page = (c // PAGE) % MAX_PAGES
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order_ptr + k * tokens + place, mask=place < tokens, other=0).to(tl.int64)
    NONE: tl.constexpr = 2147483647
    left = tl.load(slots_ptr + token * TOP + k, mask=place < tokens, other=-1).to(tl.int32)
    left = tl.where(left < 0, NONE, left)
    slot = tl.min(left, 0)
    while slot < NONE:
        mine = left == slot
        owned = page < tl.load(count_ptr + piece * adapters + slot, mask=c < COLUMNS, other=0)
        if tl.max(owned.to(tl.int32), 0) > 0:
            first = tl.load(first_ptr + piece * adapters + slot, mask=owned, other=0)
            rows = a_ptr + ((piece * pages + first + page).to(tl.int64) * PAGE + c % PAGE) * width_in
            acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for start in range(split * BLOCK_D, width_in, SPLIT * BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                inside = d < width_in
                x = tl.load(
                    x_ptr + token[:, None] * stride_x + d[None, :], mask=mine[:, None] & inside[None, :], other=0.0
                )
                a = tl.load(rows[None, :] + d[:, None], mask=inside[:, None] & owned[None, :], other=0.0)
                if UPCAST:
                    x, a = x.to(tl.float32), a.to(tl.float32)
                acc = tl.dot(x, a, acc, input_precision="ieee")
            at = ((split * tokens + token) * TOP + k) * COLUMNS
            tl.store(h_ptr + at[:, None] + c[None, :], acc, mask=mine[:, None] & owned[None, :])
        left = tl.where(mine, NONE, left)
        slot = tl.min(left, 0)


def shrink(
    x: torch.Tensor,
    pages: PageView,
    slots: torch.Tensor,
    order: torch.Tensor | None,
    tile: ShrinkTile,
    upcast: bool,
    zeros: bool = False,
) -> torch.Tensor:
    """[split, T, S, slices x pages x PAGE] float32: partial sums of h, to be added up over ``split``.

    What no adapter reaches is not written: the expand does not read it.

    Args:
        x: [T, D], rows contiguous.
        pages: the adapters.
        slots: [T, S] int32 or int64, contiguous, -1 for none.
        order: of :func:`molora_kernels.order.order_by_slot`; None: the form by token.
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
    if order is None:
        _shrink_token_kernel[(T * S, parts, split)](
            x, pages.A, h, slots, pages.first, pages.count,
            T * S, pages.inputs, pages.pages, pages.slots, x.stride(0),
            **shape, BLOCK_D=256, num_warps=4,
        )  # fmt: skip
    else:
        columns = max(16, min(64, triton.next_power_of_2(parts * PAGE)))
        _shrink_block_kernel[(triton.cdiv(T, tile.t), triton.cdiv(parts * PAGE, columns), S * split)](
            x, pages.A, h, slots, order, pages.first, pages.count,
            T, pages.inputs, pages.pages, pages.slots, x.stride(0),
            **shape, BLOCK_T=tile.t, BLOCK_D=tile.d, BLOCK_R=columns, UPCAST=upcast,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return h
