"""Grouped shrink in Triton: h(t, k) = x(t) A_s^T for s = slots(t, k), all slices of a group in one launch.

Three forms of one function. By token (few tokens): a program for each (token, k). By block (a prompt): a program for
a block of tokens and a few of the slots that act there. Hot (few adapters): the ranks of all adapters for every token,
one product of the library, for which the choice of slots does not matter and top-k costs what top-1 does.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.blocks import Blocks, slot_rows
from molora_kernels.limits import COUNTS, fitting_block
from molora_kernels.pages import PAGE, PageView

_TARGET_PROGRAMS = 264  # by token: two for each of an H100's multiprocessors
_SHORTEST_PART = 256  # elements of D that a program should have at least


@dataclass(frozen=True)
class ShrinkTile:
    """How the form by block is cut: tokens, elements of the input, slots at once, warps, pipeline stages."""

    t: int = 16
    d: int = 128
    at_once: int = 1
    warps: int = 4
    stages: int = 3


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
def _shrink_block_kernel(
    x_ptr, a_ptr, h_ptr, slots_ptr, order_ptr, first_ptr, count_ptr,
    tokens, width_in, pages, adapters, stride_x,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program has a part of a block's tokens: enough programs that none needs a part of the sum."""
    # Columns of the product: the ranks of all slices of AT_ONCE slots, so that x is read once for all of them.
    COLUMNS: tl.constexpr = SLICES * MAX_PAGES * PAGE
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    piece = (c % COLUMNS) // (MAX_PAGES * PAGE)
    page = (c // PAGE) % MAX_PAGES
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = place < tokens
    token = tl.load(order_ptr + place, mask=here, other=0).to(tl.int64)
    slots = slot_rows(token, here, slots_ptr, TOP)
    last = tl.max(slots[0], 0)
    for k in tl.static_range(1, TOP):
        last = tl.maximum(last, tl.max(slots[k], 0))
    done = tl.full((), -1, tl.int32)
    while done < last:
        # The next slots in the order of their numbers, found in registers: a list would be one more load to wait for.
        slot = tl.full((BLOCK_R,), -1, tl.int32)
        for j in tl.static_range(AT_ONCE):
            following = last
            for k in tl.static_range(TOP):
                following = tl.minimum(following, tl.min(tl.where(slots[k] > done, slots[k], last), 0))
            slot = tl.where((c // COLUMNS == j) & (done < last), following, slot)
            done = following
        owned = page < tl.load(count_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
        first = tl.load(first_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
        a_rows = a_ptr + ((piece * pages + first + page).to(tl.int64) * PAGE + c % PAGE) * width_in
        acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, width_in, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = d < width_in
            x = tl.load(x_ptr + token[:, None] * stride_x + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            a = tl.load(a_rows[None, :] + d[:, None], mask=inside[:, None] & owned[None, :], other=0.0)
            if UPCAST:
                x, a = x.to(tl.float32), a.to(tl.float32)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        for k in tl.static_range(TOP):
            cells = (token * TOP + k)[:, None] * COLUMNS + (c % COLUMNS)[None, :]
            tl.store(
                h_ptr + cells, acc.to(h_ptr.dtype.element_ty),
                mask=(slots[k][:, None] == slot[None, :]) & owned[None, :],
            )  # fmt: skip


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
    """h as [parts, T, S, slices x max_pages x PAGE], to be added up over the parts: by token float32, by block one part
    in the dtype of x, which is what the expand multiplies.

    What no adapter reaches is not written: the expand does not read it.

    Args:
        x: [T, D], rows contiguous.
        pages: the adapters.
        slots: [T, S] int32 or int64, contiguous, -1 for none.
        blocks: of :func:`molora_kernels.blocks.make_blocks`; None: the form by token.
        tile: how the form by block is cut.
        upcast: multiply in float32 (Triton's interpreter gets half precision wrong).
        zeros: what no adapter reaches is 0 instead.
    """
    T, S = slots.shape
    slices, make = len(pages.outputs), torch.zeros if zeros else torch.empty
    columns = slices * pages.max_pages * PAGE
    shape = {"TOP": S, "SLICES": slices, "MAX_PAGES": pages.max_pages, "PAGE": PAGE}
    if blocks is None:
        parts = _parts(T * S * slices, pages.inputs)
        h = make(parts, T, S, columns, dtype=torch.float32, device=x.device)
        _shrink_token_kernel[(T * S, slices * pages.max_pages, parts)](
            x, pages.A, h, slots, pages.first, pages.count,
            T * S, pages.inputs, pages.pages, pages.slots, x.stride(0),
            **shape, SPLIT=parts, BLOCK_D=256, num_warps=4,
        )  # fmt: skip
        return h
    h = make(1, T, S, columns, dtype=x.dtype, device=x.device)
    wide = tile.at_once * columns
    block_r = max(16, min(128, triton.next_power_of_2(wide)))
    block_d = fitting_block(tile.d, (tile.t + block_r) * (tile.stages - 1) * x.element_size(), x.device)
    _shrink_block_kernel[(triton.cdiv(T, tile.t), triton.cdiv(wide, block_r))](
        x, pages.A, h, slots, blocks.order, pages.first, pages.count,
        T, pages.inputs, pages.pages, pages.slots, x.stride(0),
        **shape, BLOCK_T=tile.t, BLOCK_D=block_d, BLOCK_R=block_r, AT_ONCE=tile.at_once, UPCAST=upcast,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h


def _parts(programs: int, inputs: int) -> int:
    """Of the sum over D, for few programs."""
    parts = 1
    while parts < 16 and programs * parts < _TARGET_PROGRAMS and inputs // (parts * 2) >= _SHORTEST_PART:
        parts *= 2
    return parts
