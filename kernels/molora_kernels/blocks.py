"""Blocks of tokens in Triton: which slots act in each, and what these add to a tile of the output.

A block is 64 tokens, next to one another in the plan's order. Its list of slots is made once a forward; each kernel
goes along the list, so that its work follows the tokens that are there, and any order gives the same result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from molora_kernels.limits import COUNTS

BLOCK = 64  # tokens
PAIRED = tl.constexpr(4)  # columns of a plan up to which all pairs of slots are compared


@dataclass(frozen=True)
class Blocks:
    """order: [T] int64, or None as they are. lists: [blocks, most] int32, the slots of each block, then nothing of
    meaning. counts: [blocks] int32, how many there are."""

    order: torch.Tensor | None
    lists: torch.Tensor
    counts: torch.Tensor


@triton.jit(do_not_specialize=COUNTS)
def _blocks_kernel(
    slots_ptr, order_ptr, lists_ptr, counts_ptr, tokens, most,
    TOP: tl.constexpr, TOPS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """A list has room for ``most`` slots, which is as many as can act."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK * TOPS)
    v = _slots_of(i, block, slots_ptr, order_ptr, tokens, TOP, TOPS, BLOCK, ORDERED)
    list_ptr = lists_ptr + block.to(tl.int64) * most
    if TOPS <= PAIRED:  # a slot is listed where it occurs first: all pairs are compared at once
        # The same numbers laid out along the other axis.
        w = tl.sum(tl.where(i[:, None] == i[None, :], v[:, None], 0), 0)
        again = tl.max(((v[:, None] == w[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        new = (v >= 0) & (again == 0)
        place = tl.cumsum(new.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, v, mask=new & (place < most))
        many = tl.sum(new.to(tl.int32), 0)
    else:  # one after the other: the square of so many is code that takes minutes to compile
        last = tl.max(v, 0)
        done = tl.full((), -1, tl.int32)
        many = 0
        while done < last:
            done = tl.min(tl.where(v > done, v, last), 0)
            tl.store(list_ptr + many, done, mask=many < most)
            many += 1
    tl.store(counts_ptr + block, tl.minimum(many, most))


@triton.jit
def _slots_of(
    i, block, slots_ptr, order_ptr, tokens,
    TOP: tl.constexpr, TOPS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    place = block * BLOCK + i // TOPS
    k = i % TOPS
    token = place.to(tl.int64)
    if ORDERED:
        token = tl.load(order_ptr + place, mask=place < tokens, other=0).to(tl.int64)
    return tl.load(slots_ptr + token * TOP + k, mask=(place < tokens) & (k < TOP), other=-1).to(tl.int32)


@triton.jit
def slot_rows(token, here, slots_ptr, TOP: tl.constexpr):
    """For each column of the plan the slots of ``token``."""
    found = ()
    for k in tl.static_range(TOP):
        found = found + (tl.load(slots_ptr + token * TOP + k, mask=here, other=-1).to(tl.int32),)  # noqa: RUF005
    return found


@triton.jit
def plan_rows(token, here, slots_ptr, weights_ptr, TOP: tl.constexpr):
    """For each column of the plan the slots and the weights of ``token``."""
    found = ()
    for k in tl.static_range(TOP):
        slot = tl.load(slots_ptr + token * TOP + k, mask=here, other=-1).to(tl.int32)
        found = found + ((slot, tl.load(weights_ptr + token * TOP + k, mask=here, other=0.0)),)  # noqa: RUF005
    return found


@triton.jit
def early_tiles(
    block, piece, column, width, o, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, most, pages, adapters,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Columns ``o`` of slice ``piece`` (which begins at ``column`` and is ``width`` wide) of the first pages of the
    first AT_ONCE slots of a block, for :func:`add_adapters`. Nothing of this is written by the kernel before, so it is
    asked for before that one is done; few blocks have more slots."""
    many = tl.load(counts_ptr + block)
    found = ()
    for j in tl.static_range(AT_ONCE):
        slot = _slot_at(block, j, many, lists_ptr, most)
        tile = _b_tile(
            slot, 0, piece, column, width, o, inside, b_ptr, first_ptr, count_ptr, pages, adapters, PAGES, PAGE
        )
        found = found + ((slot, tile[0], tile[1], tile[2]),)  # noqa: RUF005 - Triton knows no stars
    return found


@triton.jit
def _slot_at(block, i, many, lists_ptr, most):
    return tl.load(lists_ptr + block.to(tl.int64) * most + i, mask=i < many, other=-1)


@triton.jit
def _b_tile(
    slot, start, piece, column, width, o, inside, b_ptr, first_ptr, count_ptr, pages, adapters,
    PAGES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """PAGES pages of a slot from the ``start``-th on: the first of their rows among all, how many rows there are, and
    their columns ``o``."""
    owned = tl.load(count_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
    first = tl.load(first_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
    row, rows = (first + start).to(tl.int64) * PAGE, (owned - start) * PAGE
    r = tl.arange(0, PAGES * PAGE)
    at = b_ptr + column.to(tl.int64) * PAGE * pages + (row + r)[:, None] * width + o[None, :]
    return row, rows, tl.load(at, mask=(r < rows)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _add_tile(
    acc, slot, start, row, rows, b, piece, plan, token, h_ptr, tokens, pages,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc plus the product of what ``token`` shrank for a slot, by its weights, with ``b`` (of :func:`_b_tile`)."""
    r = tl.arange(0, PAGES * PAGE)
    h = tl.zeros((token.shape[0], PAGES * PAGE), tl.float32)
    for k in tl.static_range(TOP):
        mask = ((plan[k][0] == slot) & (slot >= 0))[:, None] & (r < rows)[None, :]
        if HOT:
            at = token[:, None] * (SLICES * pages * PAGE) + piece * pages * PAGE + row + r[None, :]
            h += tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) * plan[k][1][:, None]
        else:
            for split in tl.static_range(SPLIT):
                at = ((split * tokens + token) * TOP + k)[:, None] * (SLICES * MAX_PAGES * PAGE)
                at += (piece * MAX_PAGES + start) * PAGE + r[None, :]
                h += tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) * plan[k][1][:, None]
    if UPCAST:
        b = b.to(tl.float32)
    return tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def add_adapters(
    acc_a, acc_b, early_a, early_b, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside,
    plan, token, block, h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
    TWO: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc_a [tokens, o_a] and, if TWO, acc_b [tokens, o_b] plus what the adapters that act in ``block`` add there.

    ``early_a``, ``early_b``: of :func:`early_tiles`. ``plan``: of :func:`plan_rows`. HOT: h has the ranks of all pages,
    [T, slices x pages x PAGE]; else those of each pair, [SPLIT, T, TOP, slices x MAX_PAGES x PAGE] parts of the sum.
    """
    many = tl.load(counts_ptr + block)
    for j in tl.static_range(AT_ONCE):
        slot = early_a[j][0]
        if j < many:
            acc_a = _add_tile(
                acc_a, slot, 0, early_a[j][1], early_a[j][2], early_a[j][3], piece_a, plan, token, h_ptr, tokens, pages,
                TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
            )  # fmt: skip
            if TWO:
                acc_b = _add_tile(
                    acc_b, slot, 0, early_b[j][1], early_b[j][2], early_b[j][3], piece_b, plan, token, h_ptr, tokens,
                    pages, TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
                )  # fmt: skip
            acc_a, acc_b = _add_pages(
                acc_a, acc_b, slot, PAGES, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
                h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
                TWO, TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
            )  # fmt: skip
    for i in range(AT_ONCE, many, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            acc_a, acc_b = _add_pages(
                acc_a, acc_b, _slot_at(block, i + j, many, lists_ptr, most), 0,
                piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
                h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
                TWO, TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
            )  # fmt: skip
    return acc_a, acc_b


@triton.jit
def _add_pages(
    acc_a, acc_b, slot, FROM: tl.constexpr, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
    h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
    TWO: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All pages of a slot from page FROM on."""
    if MAX_PAGES > PAGES:
        owned = tl.load(count_ptr + piece_a * adapters + slot, mask=slot >= 0, other=0)
        if TWO:
            owned = tl.maximum(owned, tl.load(count_ptr + piece_b * adapters + slot, mask=slot >= 0, other=0))
        for start in range(FROM, owned, PAGES):
            acc_a, acc_b = _add_some(
                acc_a, acc_b, slot, start, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
                h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
                TWO, TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
            )  # fmt: skip
    elif FROM == 0:
        acc_a, acc_b = _add_some(
            acc_a, acc_b, slot, 0, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
            h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
            TWO, TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    return acc_a, acc_b


@triton.jit
def _add_some(
    acc_a, acc_b, slot, start, piece_a, column_a, o_a, piece_b, column_b, o_b, width, inside, plan, token,
    h_ptr, b_ptr, first_ptr, count_ptr, tokens, pages, adapters,
    TWO: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """PAGES pages of a slot from page ``start`` on."""
    a = _b_tile(
        slot, start, piece_a, column_a, width, o_a, inside, b_ptr, first_ptr, count_ptr, pages, adapters, PAGES, PAGE
    )
    acc_a = _add_tile(
        acc_a, slot, start, a[0], a[1], a[2], piece_a, plan, token, h_ptr, tokens, pages,
        TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
    )  # fmt: skip
    if TWO:
        b = _b_tile(
            slot, start, piece_b, column_b, width, o_b, inside, b_ptr, first_ptr, count_ptr, pages, adapters,
            PAGES, PAGE,
        )  # fmt: skip
        acc_b = _add_tile(
            acc_b, slot, start, b[0], b[1], b[2], piece_b, plan, token, h_ptr, tokens, pages,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    return acc_a, acc_b


def make_blocks(slots: torch.Tensor, order: torch.Tensor | None, most: int | None = None) -> Blocks:
    """The blocks of a plan; nothing waits for the device.

    Args:
        slots: [T, S] int32 or int64, contiguous, -1 for none.
        order: of :func:`molora_kernels.order.order_by_slot`; None: as they are.
        most: how many different slots there are at all, if that is known.
    """
    T, S = slots.shape
    count = max(1, triton.cdiv(T, BLOCK))
    room = min(BLOCK, max(T, 1)) * S
    blocks = Blocks(
        order,
        torch.empty(count, room if most is None else max(1, min(room, most)), dtype=torch.int32, device=slots.device),
        torch.empty(count, dtype=torch.int32, device=slots.device),
    )
    list_slots(slots, blocks)
    return blocks


def list_slots(slots: torch.Tensor, blocks: Blocks) -> None:
    """Writes the lists of ``blocks``, for slots [T, S] of as many tokens."""
    T, S = slots.shape
    tops, order = triton.next_power_of_2(S), blocks.order
    size = min(BLOCK, max(16, triton.next_power_of_2(T)))
    _blocks_kernel[(len(blocks.counts),)](
        slots, slots if order is None else order, blocks.lists, blocks.counts, T, blocks.lists.shape[1],
        TOP=S, TOPS=tops, BLOCK=size, ORDERED=order is not None,
        num_warps=max(1, min(8, (size * tops) ** 2 // 2048)) if tops <= PAIRED else 4,
    )  # fmt: skip
