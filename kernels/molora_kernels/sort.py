"""The tokens of a plan in the order of their slots, in one launch: each counts those that come before it."""

import torch
import triton
import triton.language as tl

from molora_kernels.limits import COUNTS


@triton.jit
def _keys(t, slots_ptr, tokens, columns, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """The slots of tokens ``t`` as one number, the lowest foremost; past the last token, more than any."""
    HIGHEST: tl.constexpr = 2**31 - 1 if COLUMNS == 1 else 2**62
    at = slots_ptr + t.to(tl.int64) * columns
    key = tl.load(at, mask=t < tokens, other=0)
    if COLUMNS > 1:
        other = tl.load(at + 1, mask=t < tokens, other=0)
        low, high = tl.minimum(key, other), tl.maximum(key, other)
        if COLUMNS > 2:
            other = tl.load(at + 2, mask=t < tokens, other=0)
            middle = tl.minimum(high, other)
            high = tl.maximum(high, other)
            low, middle = tl.minimum(low, middle), tl.maximum(low, middle)
            key = (low.to(tl.int64) << BITS) + middle
        else:
            key = low
        key = (key.to(tl.int64) << BITS) + high
    return tl.where(t < tokens, key, HIGHEST)


@triton.jit(do_not_specialize=COUNTS)
def _order_kernel(
    slots_ptr, order_ptr, tokens, columns,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_T
    own = first // BLOCK_J * BLOCK_J  # where the tile begins that these tokens lie in
    i = first + tl.arange(0, BLOCK_T)
    mine = _keys(i, slots_ptr, tokens, columns, COLUMNS, BITS)[:, None]
    before = tl.zeros((BLOCK_T, BLOCK_J), tl.int32)
    for start in range(0, tokens, BLOCK_J):
        key = _keys(start + tl.arange(0, BLOCK_J), slots_ptr, tokens, columns, COLUMNS, BITS)[None, :]
        before += (key < mine + (start < own)).to(tl.int32)  # of equals, those of an earlier tile
    j = own + tl.arange(0, BLOCK_J)
    key = _keys(j, slots_ptr, tokens, columns, COLUMNS, BITS)[None, :]
    before += ((key == mine) & (j[None, :] < i[:, None])).to(tl.int32)
    tl.store(order_ptr + tl.sum(before, 1), i.to(tl.int64), mask=i < tokens)


def order_by_counting(slots: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """[T] int64: the tokens by the slots of their first ``columns`` columns, from the lowest of a token on; stable.

    T^2 comparisons, for as many tokens as a GPU does that in less time than it takes to launch a radix sort's passes.

    Args:
        slots: [T, S] int32 or int64, contiguous, from -1 on.
        columns: up to 3.
        bits: of a slot.
    """
    T, S = slots.shape
    order = torch.empty(T, dtype=torch.int64, device=slots.device)
    _order_kernel[(triton.cdiv(T, 16),)](
        slots, order, T, S, COLUMNS=min(S, columns), BITS=bits, BLOCK_T=16, BLOCK_J=1024, num_warps=8
    )  # fmt: skip
    return order
