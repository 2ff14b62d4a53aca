"""What stands between a prompt's products, in Triton: the kernels of :mod:`molora_kernels.step` for blocks of tokens.

Each takes the product before it, adds the adapters' expand, and does the base's own work on the result in the same
pass, so that adapters cost no pass of their own over the output. Few tokens go through the kernels of a decode step.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from molora_kernels import step
from molora_kernels.blocks import BLOCK, add_block, plan_rows
from molora_kernels.expand import block_shape
from molora_kernels.order import PagedPlan
from molora_kernels.paged import TOKEN_FORM
from molora_kernels.pages import PageView
from molora_kernels.tiles import expand_tile


@dataclass
class Shrunk:
    """What adapters add to a group's product. h: of :func:`molora_kernels.paged.shrink_paged`."""

    h: torch.Tensor
    pages: PageView
    plan: PagedPlan


@triton.jit
def _tokens(block, order_ptr, tokens, BLOCK_T: tl.constexpr, ADAPTED: tl.constexpr):
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = place.to(tl.int64)
    if ADAPTED:
        token = tl.load(order_ptr + place, mask=place < tokens, other=0).to(tl.int64)
    return token, place < tokens


@triton.jit
def _tile(y_ptr, token, here, stride, o, inside):
    at = token[:, None] * stride + o[None, :]
    return tl.load(y_ptr + at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _add_kernel(
    r_ptr, y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, width, most, pages, adapters,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token, here = _tokens(block, order_ptr, tokens, BLOCK_T, ADAPTED)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    acc = _tile(r_ptr, token, here, width, o, inside) + _tile(y_ptr, token, here, width, o, inside)
    if ADAPTED:
        rows = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
        acc = add_block(
            acc, rows, token, block, 0, block * 0, width, o, inside,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    at = token[:, None] * width + o[None, :]
    tl.store(r_ptr + at, acc.to(r_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _gate_kernel(
    m_ptr, y_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, width, most, pages, adapters,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token, here = _tokens(block, order_ptr, tokens, BLOCK_T, ADAPTED)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    gate = _tile(y_ptr, token, here, 2 * width, o, inside)
    up = _tile(y_ptr + width, token, here, 2 * width, o, inside)
    if ADAPTED:
        rows = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
        start = block * 0
        gate = add_block(
            gate, rows, token, block, 0, start, width, o, inside,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
        up = add_block(
            up, rows, token, block, 1, start + width, width, o, inside,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    m = gate / (1.0 + tl.exp(-gate)) * up
    at = token[:, None] * width + o[None, :]
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _heads_kernel(
    y_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, length_ptr,
    h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, most, pages, adapters, heads, kv_heads, longest, each, eps,
    HALF: tl.constexpr, BLOCK_O: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr,
    HOT: tl.constexpr, AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    token, here = _tokens(block, order_ptr, tokens, BLOCK_T, ADAPTED)
    piece = tl.where(head < heads, 0, tl.where(head < heads + kv_heads, 1, 2))
    before = tl.where(piece == 0, 0, tl.where(piece == 1, heads, heads + kv_heads))
    head = head - before
    column = before * (2 * HALF)
    width = tl.where(piece == 0, heads, kv_heads) * (2 * HALF)
    width_out = (heads + 2 * kv_heads) * (2 * HALF)
    i = tl.arange(0, BLOCK_O)
    inside = i < HALF
    o_low = head * (2 * HALF) + i
    o_high = o_low + HALF
    low = _tile(y_ptr, token, here, width_out, column + o_low, inside)
    high = _tile(y_ptr, token, here, width_out, column + o_high, inside)
    if BIAS:
        low += tl.load(bias_ptr + column + o_low, mask=inside, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias_ptr + column + o_high, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ADAPTED:
        rows = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
        low = add_block(
            low, rows, token, block, piece, column, width, o_low, inside,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
        high = add_block(
            high, rows, token, block, piece, column, width, o_high, inside,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    mask = here[:, None] & inside[None, :]
    place = tl.load(length_ptr) + token % each
    cells = (((token // each) * kv_heads + head) * longest + place)[:, None] * (2 * HALF) + i[None, :]
    if piece == 2:
        tl.store(values_ptr + cells, low.to(values_ptr.dtype.element_ty), mask=mask)
        tl.store(values_ptr + cells + HALF, high.to(values_ptr.dtype.element_ty), mask=mask)
    else:
        if NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
            gains = q_norm_ptr
            if piece == 1:
                gains = k_norm_ptr
            low = low * scale * tl.load(gains + i, mask=inside, other=0.0).to(tl.float32)[None, :]
            high = high * scale * tl.load(gains + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        at = tl.load(positions_ptr + token, mask=here, other=0)[:, None] * HALF + i[None, :]
        cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
        turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
        if piece == 0:
            q = q_ptr + (((token // each) * heads + head) * each + token % each)[:, None] * (2 * HALF) + i[None, :]
            tl.store(q, turned_low.to(q_ptr.dtype.element_ty), mask=mask)
            tl.store(q + HALF, turned_high.to(q_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(keys_ptr + cells, turned_low.to(keys_ptr.dtype.element_ty), mask=mask)
            tl.store(keys_ptr + cells + HALF, turned_high.to(keys_ptr.dtype.element_ty), mask=mask)


def _adapters(
    added: Shrunk | None, stand_in: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Pointers, sizes, and shape constants of what adapters add."""
    shape: dict[str, int | bool]
    upcast = stand_in.device.type == "cpu"
    if added is None:
        shape = dict.fromkeys(("TOP", "SLICES", "MAX_PAGES", "SPLIT", "AT_ONCE", "PAGES", "PAGE"), 1)
        return (stand_in,) * 9, (0, 0, 0), {**shape, "ADAPTED": False, "HOT": False, "UPCAST": upcast}
    pages, plan, blocks = added.pages, added.plan, added.plan.blocks
    assert blocks.order is not None
    tile = expand_tile(len(plan.slots), pages.slots)
    pointers = (added.h, pages.B, plan.weights, plan.slots, blocks.order, blocks.lists, blocks.counts, pages.first,
                pages.count)  # fmt: skip
    shape = {**block_shape(added.h, pages, plan.slots, tile.at_once), "ADAPTED": True, "UPCAST": upcast}
    return pointers, (blocks.lists.shape[1], pages.pages, pages.slots), shape


def _by_token(added: Shrunk | None) -> step.Added | None:
    return None if added is None else step.Added(added.h, added.pages, added.plan.slots, added.plan.weights)


def add(residual: torch.Tensor, y: torch.Tensor, added: Shrunk | None) -> None:
    """residual [T, D] += y [T, D] + adapters."""
    T, D = residual.shape
    pointers, sizes, shape = _adapters(added, residual)
    block = 128
    _add_kernel[(triton.cdiv(T, BLOCK), triton.cdiv(D, block))](
        residual, y, *pointers, T, D, *sizes, **shape, BLOCK_T=BLOCK, BLOCK_O=block, num_warps=4
    )


def add_norm(
    residual: torch.Tensor, y: torch.Tensor, gain: torch.Tensor, x: torch.Tensor, eps: float, added: Shrunk | None
) -> None:
    """As :func:`molora_kernels.step.add_norm`, of y [T, D]."""
    if len(y) <= TOKEN_FORM:
        step.add_norm(residual, y.unsqueeze(0), gain, x, eps, _by_token(added))
    else:
        add(residual, y, added)
        step.add_norm(residual, None, gain, x, eps)


def gate(y: torch.Tensor, m: torch.Tensor, added: Shrunk | None) -> None:
    """m [T, I] = SiLU(gate) * up, of y [T, 2 I] and of what adapters add to it."""
    T, width = m.shape
    if T <= TOKEN_FORM:
        step.gate(y.unsqueeze(0), m, _by_token(added))
        return
    pointers, sizes, shape = _adapters(added, m)
    block = 64
    _gate_kernel[(triton.cdiv(T, BLOCK), triton.cdiv(width, block))](
        m, y, *pointers, T, width, *sizes, **shape, BLOCK_T=BLOCK, BLOCK_O=block, num_warps=4
    )


def heads(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    length: torch.Tensor,
    added: Shrunk | None,
) -> None:
    """From the product of q, k and v: q to ``q``, k and v to their places in the cache.

    Args:
        y: [N T, (H + 2 G) d]. bias: [(H + 2 G) d].
        q: [N, H, T, d], written.
        keys, values: [N, G, longest, d], contiguous; T positions from ``length`` on are written.
        norms, rotary: as for :func:`molora_kernels.step.heads`.
        positions: [N T] int64, the rotary position of each token. length: [1] int64.
        added: what adapters add to y.
    """
    N, H, T, d = q.shape
    if N * T <= TOKEN_FORM:
        step.heads(
            y.unsqueeze(0), bias, q, keys, values, norms, rotary, positions, length, _by_token(added)
        )  # fmt: skip
        return
    G, longest = keys.shape[1], keys.shape[2]
    pointers, sizes, shape = _adapters(added, q)
    q_norm, k_norm, eps = norms if norms is not None else (q, q, 0.0)
    _heads_kernel[(triton.cdiv(N * T, BLOCK), H + 2 * G)](
        y, q if bias is None else bias, q, keys, values, q_norm, k_norm, *rotary, positions, length,
        *pointers, N * T, *sizes, H, G, longest, T, eps,
        HALF=d // 2, BLOCK_O=max(16, triton.next_power_of_2(d // 2)), NORM=norms is not None, BIAS=bias is not None,
        **shape, BLOCK_T=BLOCK, num_warps=4,
    )  # fmt: skip
