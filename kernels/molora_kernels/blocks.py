"""Blocks of tokens in Triton: which slots act in each, and what these add to a tile of the output.

A block is 64 tokens, next to one another in the plan's order. Its list of slots is made once a forward; each kernel
goes along the list, so that its work follows the tokens that are there, and any order gives the same result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 64  # tokens


@dataclass(frozen=True)
class Blocks:
    """order: [T] int64, or None as they are. lists: [blocks, most] int32, the slots of each block, then nothing of
    meaning. counts: [blocks] int32, how many there are."""

    order: torch.Tensor | None
    lists: torch.Tensor
    counts: torch.Tensor


@triton.jit
def _blocks_kernel(
    slots_ptr, order_ptr, lists_ptr, counts_ptr, tokens, most,
    TOP: tl.constexpr, TOPS: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """A slot is listed where it occurs first: all pairs are compared at once. A list has room for ``most`` slots, which
    is as many as can act."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK * TOPS)
    v = _slots_of(i, block, slots_ptr, order_ptr, tokens, TOP, TOPS, BLOCK, ORDERED)
    # The same numbers laid out along the other axis.
    w = tl.sum(tl.where(i[:, None] == i[None, :], v[:, None], 0), 0)
    again = tl.max(((v[:, None] == w[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    new = (v >= 0) & (again == 0)
    place = tl.cumsum(new.to(tl.int32), 0) - 1
    tl.store(lists_ptr + block.to(tl.int64) * most + place, v, mask=new & (place < most))
    tl.store(counts_ptr + block, tl.minimum(tl.sum(new.to(tl.int32), 0), most))


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
        found = found + ((slot, tl.load(weights_ptr + token * TOP + k, mask=slot >= 0, other=0.0)),)  # noqa: RUF005
    return found


@triton.jit
def add_block(
    acc, rows, token, block, piece, column, width, o, inside,
    h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc [tokens of the block, columns ``o`` of slice ``piece``] plus what the adapters add.

    AT_ONCE slots, PAGES pages of each, are one product. HOT: h has the ranks of all slots, [T, slices x pages x PAGE];
    else those of each pair, [SPLIT, T, TOP, slices x MAX_PAGES x PAGE] float32 parts of the sum. ``rows``: of
    :func:`plan_rows`. The slice begins at ``column`` and is ``width`` wide.
    """
    r = tl.arange(0, AT_ONCE * PAGES * PAGE)
    chunk = r // PAGE
    many = tl.load(counts_ptr + block)
    for i in range(0, many, AT_ONCE):
        place = i + chunk // PAGES
        slot = tl.load(lists_ptr + block.to(tl.int64) * most + place, mask=place < many, other=-1)
        owned = tl.load(count_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
        first = tl.load(first_ptr + piece * adapters + slot, mask=slot >= 0, other=0)
        for start in tl.static_range(0, MAX_PAGES, PAGES):
            page = start + chunk % PAGES
            there = page < owned
            row = (first + page).to(tl.int64) * PAGE + r % PAGE
            b = tl.load(
                b_ptr + column.to(tl.int64) * PAGE * pages + row[:, None] * width + o[None, :],
                mask=there[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            if HOT:
                gate = tl.zeros((token.shape[0], AT_ONCE * PAGES * PAGE), tl.float32)
                for k in tl.static_range(TOP):
                    gate += tl.where(rows[k][0][:, None] == slot[None, :], rows[k][1][:, None], 0.0)
                at = token[:, None] * (SLICES * pages * PAGE) + (piece * pages * PAGE + row)[None, :]
                h = tl.load(h_ptr + at, mask=(gate != 0.0) & there[None, :], other=0.0).to(tl.float32) * gate
            else:
                h = tl.zeros((token.shape[0], AT_ONCE * PAGES * PAGE), tl.float32)
                for k in tl.static_range(TOP):
                    mine = (rows[k][0][:, None] == slot[None, :]) & there[None, :]
                    for split in tl.static_range(SPLIT):
                        at = ((split * tokens + token) * TOP + k)[:, None] * (SLICES * MAX_PAGES * PAGE)
                        at += ((piece * MAX_PAGES + page) * PAGE + r % PAGE)[None, :]
                        h += tl.load(h_ptr + at, mask=mine, other=0.0).to(tl.float32) * rows[k][1][:, None]
            if UPCAST:
                b = b.to(tl.float32)
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    return acc


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
        num_warps=max(1, min(8, (size * tops) ** 2 // 2048)),
    )  # fmt: skip
