"""The kernels of :mod:`molora_kernels.epilogue` for few tokens: a program has columns of one token, and reads what
adapters it needs before the product is there."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.limits import COUNTS
from molora_kernels.pages import PAGE
from molora_kernels.rows import add_lora, core_pointers, core_ranks, core_sizes, first_pages, first_rows

COLUMNS, WARPS = 128, 2  # of a program that adds no adapters
# One warp shares the ranks of a column without shared memory and its barriers, behind which loads would wait. What
# reads most (gate) gains at any number of tokens; a residual's kernel has little to read, and of many tokens many
# programs.
ADAPTED_COLUMNS, ADAPTED_WARPS = 64, 1
ADAPTED_TOKENS = 16
HEADS_WARPS = 1

if TYPE_CHECKING:
    from molora_kernels.epilogue import Added, Scale


@triton.jit
def norm_scale(squares_ptr, token, parts, width, eps, PARTS: tl.constexpr):
    """The scale of a norm of ``token``, from the parts of its sum of squares."""
    i = tl.arange(0, PARTS)
    return tl.rsqrt(tl.sum(tl.load(squares_ptr + token * parts + i, mask=i < parts, other=0.0), 0) / width + eps)


@triton.jit
def _norm_kernel(r_ptr, g_ptr, x_ptr, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < width
    g = tl.load(g_ptr + o, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    r = tl.load(r_ptr + token * width + o, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(r * r, 0) / width + eps)
    tl.store(x_ptr + token * width + o, (r * scale * g).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _add_kernel(
    r_ptr, y_ptr, g_ptr, x_ptr, squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr,
    tokens, width, parts, pages, adapters, core_width, core_pages,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, NORM: tl.constexpr,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr,
    SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    start = token * 0  # the only slice
    if NORM:
        g = tl.load(g_ptr + o, mask=inside, other=0.0).to(tl.float32)
    cores = (core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, core_width, core_pages)
    if ADAPTED:
        rows = first_rows(
            o, inside, token, 0, width, start,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
            TOP, TOPS, FIRST, CORE, PAGE,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.load(r_ptr + token * width + o, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(y_ptr + (split * tokens + token) * width + o, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        acc = add_lora(
            acc, rows, o, inside, token, 0, width, start, h_ptr, b_ptr, tokens, pages, cores,
            TOP, TOPS, FIRST, CORE, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    rounded = acc.to(r_ptr.dtype.element_ty)
    tl.store(r_ptr + token * width + o, rounded, mask=inside)
    if NORM:
        r = rounded.to(tl.float32)
        tl.store(squares_ptr + token * parts + tl.program_id(1), tl.sum(r * r, 0))
        tl.store(x_ptr + token * width + o, (r * g).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _partial_sum(
    y_ptr, token, column, o, inside, tokens, width_out, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(y_ptr + (split * tokens + token) * width_out + column + o, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _heads_kernel(
    y_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, length_ptr,
    squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, tokens, pages, adapters, core_width, core_pages,
    heads, kv_heads, longest, each, eps, parts, hidden, scale_eps,
    PARTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr, ADAPTED: tl.constexpr, TOP: tl.constexpr, TOPS: tl.constexpr,
    FIRST: tl.constexpr, CORE: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # Which of q, k and v this head belongs to.
    piece = tl.where(head < heads, 0, tl.where(head < heads + kv_heads, 1, 2))
    before = tl.where(piece == 0, 0, tl.where(piece == 1, heads, heads + kv_heads))
    head = head - before
    column = before * (2 * HALF)
    width = tl.where(piece == 0, heads, kv_heads) * (2 * HALF)
    width_out = (heads + 2 * kv_heads) * (2 * HALF)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    o_low = head * (2 * HALF) + i
    o_high = o_low + HALF
    cores = (core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, core_width, core_pages)
    if ADAPTED:
        rows_low = first_rows(
            o_low, inside, token, piece, width, column,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
            TOP, TOPS, FIRST, CORE, PAGE,
        )  # fmt: skip
        rows_high = first_rows(
            o_high, inside, token, piece, width, column,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
            TOP, TOPS, FIRST, CORE, PAGE,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    low = _partial_sum(y_ptr, token, column, o_low, inside, tokens, width_out, BLOCK, SPLIT)
    high = _partial_sum(y_ptr, token, column, o_high, inside, tokens, width_out, BLOCK, SPLIT)
    if ADAPTED:
        low = add_lora(
            low, rows_low, o_low, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages, cores,
            TOP, TOPS, FIRST, CORE, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
        high = add_lora(
            high, rows_high, o_high, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages, cores,
            TOP, TOPS, FIRST, CORE, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    if PARTS > 0:
        of_norm = norm_scale(squares_ptr, token, parts, hidden, scale_eps, PARTS)
        low *= of_norm
        high *= of_norm
    if BIAS:
        low += tl.load(bias_ptr + column + o_low, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias_ptr + column + o_high, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(length_ptr + token // each) + token % each
    cell = (((token // each) * kv_heads + head) * longest + length) * (2 * HALF)
    kept = inside & (length >= 0)
    if piece == 2:
        tl.store(values_ptr + cell + i, low.to(values_ptr.dtype.element_ty), mask=kept)
        tl.store(values_ptr + cell + HALF + i, high.to(values_ptr.dtype.element_ty), mask=kept)
    else:
        if NORM:
            scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * HALF) + eps)
            if piece == 0:
                low = low * scale * tl.load(q_norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
                high = high * scale * tl.load(q_norm_ptr + HALF + i, mask=inside, other=0.0).to(tl.float32)
            else:
                low = low * scale * tl.load(k_norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
                high = high * scale * tl.load(k_norm_ptr + HALF + i, mask=inside, other=0.0).to(tl.float32)
        at = tl.load(positions_ptr + token) * HALF
        cos = tl.load(cos_ptr + at + i, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at + i, mask=inside, other=0.0).to(tl.float32)
        turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
        if piece == 0:
            q = q_ptr + (token * heads + head) * (2 * HALF)
            tl.store(q + i, turned_low.to(q_ptr.dtype.element_ty), mask=inside)
            tl.store(q + HALF + i, turned_high.to(q_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(keys_ptr + cell + i, turned_low.to(keys_ptr.dtype.element_ty), mask=kept)
            tl.store(keys_ptr + cell + HALF + i, turned_high.to(keys_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def _gate_kernel(
    y_ptr, m_ptr, squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr,
    tokens, width, pages, adapters, core_width, core_pages, parts, hidden, scale_eps,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, SLICES: tl.constexpr,
    MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    start_gate = token * 0
    start_up = start_gate + width
    cores = (core_a_ptr, core_b_ptr, core_first_ptr, core_count_ptr, core_width, core_pages)
    if ADAPTED:
        rows_gate = first_rows(
            o, inside, token, 0, width, start_gate,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
            TOP, TOPS, FIRST, CORE, PAGE,
        )  # fmt: skip
        rows_up = first_rows(
            o, inside, token, 1, width, start_up,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
            TOP, TOPS, FIRST, CORE, PAGE,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT):
        at = y_ptr + (split * tokens + token) * (2 * width) + o
        gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        gate = add_lora(
            gate, rows_gate, o, inside, token, 0, width, start_gate, h_ptr, b_ptr, tokens, pages, cores,
            TOP, TOPS, FIRST, CORE, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
        up = add_lora(
            up, rows_up, o, inside, token, 1, width, start_up, h_ptr, b_ptr, tokens, pages, cores,
            TOP, TOPS, FIRST, CORE, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    if PARTS > 0:
        of_norm = norm_scale(squares_ptr, token, parts, hidden, scale_eps, PARTS)
        gate *= of_norm
        up *= of_norm
    m = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(m_ptr + token * width + o, m.to(m_ptr.dtype.element_ty), mask=inside)


def _adapters(
    added: "Added | None", stand_in: torch.Tensor, columns: int, warps: int, pieces: int = 1
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], dict[str, int]]:
    """Pointers, sizes, and shape constants of what adapters add to ``columns`` columns, in ``pieces`` slices, of a
    program."""
    if added is None:
        shape = dict.fromkeys(("TOP", "TOPS", "FIRST", "SLICES", "MAX_PAGES", "CUTS"), 1)
        return (stand_in,) * 10, (0,) * 4, {**shape, "ADAPTED": False, "CORE": 0, "PAGE": PAGE}
    pages, top = added.pages, added.slots.shape[1]
    tops = triton.next_power_of_2(top)
    shape = {
        "ADAPTED": True, "TOP": top, "TOPS": tops, "FIRST": first_pages(pages, tops, columns, warps, pieces),
        "CORE": core_ranks(pages), "SLICES": len(pages.outputs), "MAX_PAGES": pages.max_pages,
        "CUTS": added.h.shape[0], "PAGE": PAGE,
    }  # fmt: skip
    pointers = (added.h, pages.B, added.weights, added.slots, pages.first, pages.count, *core_pointers(pages))
    return pointers, (pages.pages, pages.slots, *core_sizes(pages)), shape


def scale_of(scale: "Scale | None", stand_in: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, float], int]:
    """Pointer, sizes, and the constant PARTS (0: none), of a norm's scale."""
    if scale is None:
        return stand_in, (0, 1, 0.0), 0
    parts = scale.squares.shape[1] if scale.parts is None else scale.parts
    return scale.squares, (parts, scale.width, scale.eps), triton.next_power_of_2(parts)


def written(scale: "Scale | None", parts: int, stand_in: torch.Tensor) -> torch.Tensor:
    """Where a kernel writes ``parts`` parts of each token's sum of squares."""
    if scale is None:
        return stand_in
    scale.parts = parts
    return scale.squares


def _cut(adapted: bool) -> tuple[int, int]:
    """Columns and warps of a program."""
    return (ADAPTED_COLUMNS, ADAPTED_WARPS) if adapted else (COLUMNS, WARPS)


def launch(pdl: bool) -> dict[str, bool]:
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


def norm(residual: torch.Tensor, gain: torch.Tensor, x: torch.Tensor, eps: float, pdl: bool) -> None:
    """x [T, D] = RMSNorm(residual) * gain."""
    T, D = residual.shape
    block = triton.next_power_of_2(D)
    _norm_kernel[(T,)](
        residual, gain, x, D, eps, BLOCK=block, num_warps=max(1, min(16, block // 128)), **launch(pdl)
    )  # fmt: skip


def add(residual: torch.Tensor, y: torch.Tensor, added: "Added | None", norm: Any, pdl: bool) -> None:
    """residual [T, D] += sum of y + adapters. norm: gain, x and scale of the norm that follows, or None."""
    T, D = residual.shape
    columns, warps = _cut(added is not None and T <= ADAPTED_TOKENS)
    pointers, of_pages, shape = _adapters(added, residual, columns, warps)
    gain, x, scale = norm if norm is not None else (residual, residual, None)
    parts = triton.cdiv(D, columns)
    squares = written(scale, parts, residual)
    _add_kernel[(T, parts)](
        residual, y, gain, x, squares, *pointers, T, D, parts, *of_pages,
        SPLIT=y.shape[0], BLOCK=columns, NORM=norm is not None,
        **shape, **launch(pdl), num_warps=warps,
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
    pdl: bool,
    scale: "Scale | None",
) -> None:
    """Of :func:`molora_kernels.epilogue.heads`."""
    N, each, H, d = q.shape
    T = N * each
    G, longest = keys.shape[1], keys.shape[2]
    pointers, of_pages, shape = _adapters(added, q, d, HEADS_WARPS)
    squares, sizes, parts = scale_of(scale, q)
    q_norm, k_norm, eps = norms if norms is not None else (q, q, 0.0)
    _heads_kernel[(T, H + 2 * G)](
        y, q if bias is None else bias, q, keys, values, q_norm, k_norm, *rotary, positions, length,
        squares, *pointers, T, *of_pages, H, G, longest, each, eps, *sizes,
        PARTS=parts, HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), NORM=norms is not None, BIAS=bias is not None,
        SPLIT=y.shape[0], **shape, **launch(pdl), num_warps=HEADS_WARPS,
    )  # fmt: skip


def gate(y: torch.Tensor, m: torch.Tensor, added: "Added | None", pdl: bool, scale: "Scale | None") -> None:
    """Of :func:`molora_kernels.epilogue.gate`."""
    T, width = m.shape
    columns, warps = _cut(added is not None)
    pointers, of_pages, shape = _adapters(added, m, 2 * columns, warps, pieces=2)
    squares, sizes, parts = scale_of(scale, m)
    _gate_kernel[(T, triton.cdiv(width, columns))](
        y, m, squares, *pointers, T, width, *of_pages, *sizes,
        PARTS=parts, SPLIT=y.shape[0], BLOCK=columns,
        **shape, **launch(pdl), num_warps=warps,
    )  # fmt: skip
