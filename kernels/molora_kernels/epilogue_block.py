"""The kernels of :mod:`molora_kernels.epilogue` for many tokens: a program has columns of some tokens that are next to
one another in the plan's order, and reads each adapter once for all of them."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from molora_kernels.blocks import BLOCK, add_adapters, early_tiles, plan_rows
from molora_kernels.epilogue_token import scale_of, written
from molora_kernels.expand import block_shape, block_stages
from molora_kernels.limits import COUNTS
from molora_kernels.tiles import EpilogueTile, epilogue_tile

ADD_BLOCK = 128  # columns of a program

if TYPE_CHECKING:
    from molora_kernels.epilogue import Added, Scale


@triton.jit
def _tokens(order_ptr, tokens, BLOCK_T: tl.constexpr, LIST: tl.constexpr, ADAPTED: tl.constexpr):
    """The tokens of this program, which of them there are, and the block whose slots are listed together."""
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = place.to(tl.int64)
    if ADAPTED:
        token = tl.load(order_ptr + place, mask=place < tokens, other=0).to(tl.int64)
    return token, place < tokens, tl.program_id(0) * BLOCK_T // LIST


@triton.jit
def _sum(acc, y_ptr, token, tokens, stride, o, mask, SPLIT: tl.constexpr):
    """acc plus the parts of the product. They are read after the adapters: they would keep registers meanwhile from
    programs beside this one, which hides more than reading early does."""
    for split in tl.static_range(SPLIT):
        at = (split * tokens + token)[:, None] * stride + o[None, :]
        acc += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _norm_scales(squares_ptr, token, here, parts, width, eps, PARTS: tl.constexpr):
    """[tokens, 1] the scale of a norm of each token, from the parts of its sum of squares."""
    i = tl.arange(0, PARTS)
    at = token[:, None] * parts + i[None, :]
    squares = tl.load(squares_ptr + at, mask=here[:, None] & (i < parts)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]


@triton.jit(do_not_specialize=COUNTS)
def _add_kernel(
    r_ptr, y_ptr, g_ptr, x_ptr, squares_ptr,
    h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, width, parts, most, pages, adapters,
    NORM: tl.constexpr, SPLIT_Y: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    token, here, block = _tokens(order_ptr, tokens, BLOCK_T, LIST, ADAPTED)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    start = block * 0  # the only slice
    if ADAPTED:
        early = early_tiles(
            block, 0, start, width, o, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
            most, pages, adapters, AT_ONCE, PAGES, PAGE,
        )  # fmt: skip
        plan = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
    mask = here[:, None] & inside[None, :]
    at = token[:, None] * width + o[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    if ADAPTED:
        acc, _ = add_adapters(
            acc, tl.zeros((1,), tl.float32), early, early, 0, start, o, 0, start, o, width, inside, plan, token, block,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            False, TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    acc += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rounded = _sum(acc, y_ptr, token, tokens, width, o, mask, SPLIT_Y).to(r_ptr.dtype.element_ty)
    tl.store(r_ptr + at, rounded, mask=mask)
    if NORM:
        g = tl.load(g_ptr + o, mask=inside, other=0.0).to(tl.float32)
        r = rounded.to(tl.float32)
        tl.store(squares_ptr + token * parts + tl.program_id(1), tl.sum(r * r, 1), mask=here)
        tl.store(x_ptr + at, (r * g[None, :]).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _gate_kernel(
    y_ptr, m_ptr, squares_ptr,
    h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, width, parts, hidden, scale_eps, most, pages, adapters,
    PARTS: tl.constexpr, SPLIT_Y: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    token, here, block = _tokens(order_ptr, tokens, BLOCK_T, LIST, ADAPTED)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = o < width
    start_gate = block * 0
    start_up = start_gate + width
    if ADAPTED:
        early_gate = early_tiles(
            block, 0, start_gate, width, o, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
            most, pages, adapters, AT_ONCE, PAGES, PAGE,
        )  # fmt: skip
        early_up = early_tiles(
            block, 1, start_up, width, o, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
            most, pages, adapters, AT_ONCE, PAGES, PAGE,
        )  # fmt: skip
        plan = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
    mask = here[:, None] & inside[None, :]
    gate = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    up = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    if ADAPTED:
        gate, up = add_adapters(
            gate, up, early_gate, early_up, 0, start_gate, o, 1, start_up, o, width, inside, plan, token, block,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            True, TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    gate = _sum(gate, y_ptr, token, tokens, 2 * width, o, mask, SPLIT_Y)
    up = _sum(up, y_ptr + width, token, tokens, 2 * width, o, mask, SPLIT_Y)
    if PARTS > 0:
        of_norm = _norm_scales(squares_ptr, token, here, parts, hidden, scale_eps, PARTS)
        gate *= of_norm
        up *= of_norm
    m = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(m_ptr + token[:, None] * width + o[None, :], m.to(m_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _heads_kernel(
    y_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, length_ptr,
    squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, order_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
    tokens, heads, kv_heads, longest, each, eps, parts, hidden, scale_eps, most, pages, adapters,
    PARTS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SPLIT_Y: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, SPLIT: tl.constexpr, HOT: tl.constexpr,
    AT_ONCE: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, UPCAST: tl.constexpr,
    LIST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    token, here, block = _tokens(order_ptr, tokens, BLOCK_T, LIST, ADAPTED)
    head = tl.program_id(1)
    # Which of q, k and v this head belongs to.
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
    if ADAPTED:
        early_low = early_tiles(
            block, piece, column, width, o_low, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
            most, pages, adapters, AT_ONCE, PAGES, PAGE,
        )  # fmt: skip
        early_high = early_tiles(
            block, piece, column, width, o_high, inside, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr,
            most, pages, adapters, AT_ONCE, PAGES, PAGE,
        )  # fmt: skip
        plan = plan_rows(token, here, slots_ptr, weights_ptr, TOP)
    mask = here[:, None] & inside[None, :]
    low = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    high = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    if ADAPTED:
        low, high = add_adapters(
            low, high, early_low, early_high, piece, column, o_low, piece, column, o_high, width, inside,
            plan, token, block,
            h_ptr, b_ptr, lists_ptr, counts_ptr, first_ptr, count_ptr, tokens, most, pages, adapters,
            True, TOP, SLICES, MAX_PAGES, SPLIT, HOT, AT_ONCE, PAGES, PAGE, UPCAST,
        )  # fmt: skip
    low = _sum(low, y_ptr, token, tokens, width_out, column + o_low, mask, SPLIT_Y)
    high = _sum(high, y_ptr, token, tokens, width_out, column + o_high, mask, SPLIT_Y)
    if PARTS > 0:
        of_norm = _norm_scales(squares_ptr, token, here, parts, hidden, scale_eps, PARTS)
        low *= of_norm
        high *= of_norm
    if BIAS:
        low += tl.load(bias_ptr + column + o_low, mask=inside, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias_ptr + column + o_high, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = tl.load(length_ptr + token // each, mask=here, other=0) + token % each
    cells = (((token // each) * kv_heads + head) * longest + place)[:, None] * (2 * HALF) + i[None, :]
    kept = mask & (place >= 0)[:, None]
    if piece == 2:
        tl.store(values_ptr + cells, low.to(values_ptr.dtype.element_ty), mask=kept)
        tl.store(values_ptr + cells + HALF, high.to(values_ptr.dtype.element_ty), mask=kept)
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
            q = q_ptr + (token * heads + head)[:, None] * (2 * HALF) + i[None, :]
            tl.store(q, turned_low.to(q_ptr.dtype.element_ty), mask=mask)
            tl.store(q + HALF, turned_high.to(q_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(keys_ptr + cells, turned_low.to(keys_ptr.dtype.element_ty), mask=kept)
            tl.store(keys_ptr + cells + HALF, turned_high.to(keys_ptr.dtype.element_ty), mask=kept)


def _adapters(
    added: "Added | None", tile: EpilogueTile, stand_in: torch.Tensor, twice: bool = False
) -> tuple[tuple[torch.Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """Pointers, sizes, and shape constants of what adapters add. twice: to two tiles of the product at once."""
    shape: dict[str, Any]
    cut = {"LIST": BLOCK, "BLOCK_T": tile.t, "UPCAST": stand_in.device.type == "cpu", "num_warps": tile.warps}
    if added is None:
        shape = dict.fromkeys(("TOP", "SLICES", "MAX_PAGES", "SPLIT", "AT_ONCE", "PAGES", "PAGE"), 1)
        return (stand_in,) * 9, (1, 0, 0), {**shape, **cut, "ADAPTED": False, "HOT": False, "num_stages": tile.stages}
    pages, blocks = added.pages, added.blocks
    assert blocks is not None and blocks.order is not None
    pointers = (added.h, pages.B, added.weights, added.slots, blocks.order, blocks.lists, blocks.counts, pages.first,
                pages.count)  # fmt: skip
    shape = block_shape(added.h, pages, added.slots, tile.at_once)
    tiles = 2 if twice else 1
    cut["num_stages"] = block_stages(tile.stages, shape, added.h, pages.B, tiles * tile.t, ADD_BLOCK)
    return pointers, (blocks.lists.shape[1], pages.pages, pages.slots), {**shape, **cut, "ADAPTED": True}


def _tile(x: torch.Tensor, tokens: int, added: "Added | None") -> EpilogueTile:
    """For ``tokens`` tokens of the kind of ``x``."""
    slots, top = (0, 1) if added is None else (added.pages.slots, added.slots.shape[1])
    tile = epilogue_tile(tokens, slots, top)
    if x.dtype == torch.float32:  # multiplied without tensor cores, by a program that is long enough as it is
        return replace(tile, t=16, at_once=1, stages=1)
    return tile


def add(residual: torch.Tensor, y: torch.Tensor, added: "Added | None", norm: Any) -> None:
    """residual [T, D] += sum of y + adapters. norm: gain, x and scale of the norm that follows, or None."""
    T, D = residual.shape
    tile = _tile(residual, T, added)
    tile = replace(tile, t=min(tile.t, 32))  # of columns it has twice as many as the others
    pointers, sizes, shape = _adapters(added, tile, residual)
    gain, x, scale = norm if norm is not None else (residual, residual, None)
    parts = triton.cdiv(D, ADD_BLOCK)
    squares = written(scale, parts, residual)
    _add_kernel[(triton.cdiv(T, tile.t), parts)](
        residual, y, gain, x, squares, *pointers, T, D, parts, *sizes,
        NORM=norm is not None, SPLIT_Y=y.shape[0], **shape, BLOCK_O=ADD_BLOCK,
    )  # fmt: skip


def gate(y: torch.Tensor, m: torch.Tensor, added: "Added | None", scale: "Scale | None") -> None:
    """Of :func:`molora_kernels.epilogue.gate`."""
    T, width = m.shape
    tile, block = _tile(m, T, added), 64
    pointers, sizes, shape = _adapters(added, tile, m, twice=True)
    squares, of_scale, parts = scale_of(scale, m)
    _gate_kernel[(triton.cdiv(T, tile.t), triton.cdiv(width, block))](
        y, m, squares, *pointers, T, width, *of_scale, *sizes,
        PARTS=parts, SPLIT_Y=y.shape[0], **shape, BLOCK_O=block,
    )  # fmt: skip


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
    added: "Added | None",
    scale: "Scale | None",
) -> None:
    """Of :func:`molora_kernels.epilogue.heads`."""
    N, each, H, d = q.shape
    G, longest = keys.shape[1], keys.shape[2]
    tile = _tile(q, N * each, added)
    pointers, sizes, shape = _adapters(added, tile, q, twice=True)
    squares, of_scale, parts = scale_of(scale, q)
    q_norm, k_norm, eps = norms if norms is not None else (q, q, 0.0)
    _heads_kernel[(triton.cdiv(N * each, tile.t), H + 2 * G)](
        y, q if bias is None else bias, q, keys, values, q_norm, k_norm, *rotary, positions, length,
        squares, *pointers, N * each, H, G, longest, each, eps, *of_scale, *sizes,
        PARTS=parts, HALF=d // 2, NORM=norms is not None, BIAS=bias is not None, SPLIT_Y=y.shape[0], **shape,
        BLOCK_O=max(16, triton.next_power_of_2(d // 2)),
    )  # fmt: skip
