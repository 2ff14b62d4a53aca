"""The kernels of :mod:`molora_kernels.epilogue` for few tokens: a program has columns of one token, and reads what
adapters it needs before the product is there."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.pages import PAGE

FIRST_PAGES = 4  # of an adapter that are asked for at once; those of a larger rank follow one by one
# Threads of one warp share the ranks of a column: more warps would have to add up through shared memory.
ADD_WARPS, HEADS_WARPS, GATE_WARPS = 2, 1, 2
ADD_BLOCK, GATE_BLOCK = 128, 128  # columns of a program

if TYPE_CHECKING:
    from molora_kernels.epilogue import Added, Scale


@triton.jit
def _acting(pair, piece, weights_ptr, slots_ptr, first_ptr, count_ptr, adapters, PAGE: tl.constexpr):
    """How many pages act, the first of their rows, and at which weight. Written long before the kernel before this one,
    so that it may be read before that one is done."""
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    acts = slot >= 0
    count = tl.load(count_ptr + piece * adapters + slot, mask=acts, other=0)
    row = tl.load(first_ptr + piece * adapters + slot, mask=acts, other=0).to(tl.int64) * PAGE
    return count, row, tl.load(weights_ptr + pair, mask=acts, other=0.0)


@triton.jit
def _b_page(b_ptr, column, pages, row, width, o, inside, wanted, PAGE: tl.constexpr):
    rows = column.to(tl.int64) * PAGE * pages + (row + tl.arange(0, PAGE)) * width
    return tl.load(b_ptr + rows[:, None] + o[None, :], mask=inside[None, :] & wanted, other=0.0)


@triton.jit
def _h_page(
    h_ptr, pair, pairs, part, wanted,
    SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    h = tl.zeros((PAGE,), tl.float32)
    for cut in tl.static_range(CUTS):
        at = (cut * pairs + pair) * (SLICES * MAX_PAGES * PAGE) + part * PAGE
        h += tl.load(h_ptr + at + tl.arange(0, PAGE), mask=wanted, other=0.0)
    return h


@triton.jit
def _first_pages(
    o, inside, token, piece, width, column, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters,
    TOP: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """For each column of the plan how many pages act, their first row, weight, and of the first EARLY pages (as many as
    fit in registers, FIRST of a column) B: nothing that the kernel before writes."""
    found = ()
    for k in tl.static_range(TOP):
        pair = token * TOP + k
        count, row, weight = _acting(pair, piece, weights_ptr, slots_ptr, first_ptr, count_ptr, adapters, PAGE)
        tiles = ()
        for page in tl.static_range(FIRST):
            if k * FIRST + page < EARLY:
                b = _b_page(b_ptr, column, pages, row + page * PAGE, width, o, inside, page < count, PAGE)
                tiles = tiles + (b,)  # noqa: RUF005 - Triton knows no stars
        found = found + ((count, row, weight, tiles),)  # noqa: RUF005
    return found


@triton.jit
def _add_lora(
    acc, firsts, o, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages,
    TOP: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """acc plus the adapters' part of the columns ``o`` of slice ``piece``, which begins at ``column`` and is ``width``
    wide. ``firsts``: of :func:`_first_pages`."""
    pairs = tokens * TOP
    shrunk = ()  # of the first pages of all columns, asked for at once
    for k in tl.static_range(TOP):
        for page in tl.static_range(FIRST):
            h = _h_page(
                h_ptr, token * TOP + k, pairs, piece * MAX_PAGES + page, page < firsts[k][0],
                SLICES, MAX_PAGES, CUTS, PAGE,
            )  # fmt: skip
            shrunk = shrunk + (h,)  # noqa: RUF005
    for k in tl.static_range(TOP):
        count, row, weight, tiles = firsts[k]
        for page in tl.static_range(FIRST):
            if k * FIRST + page < EARLY:
                b = tiles[page]
            else:
                b = _b_page(b_ptr, column, pages, row + page * PAGE, width, o, inside, page < count, PAGE)
            acc += tl.sum(b.to(tl.float32) * (shrunk[k * FIRST + page] * weight)[:, None], 0)
    if MAX_PAGES > FIRST:
        for k in tl.static_range(TOP):
            pair = token * TOP + k
            count, row, weight, tiles = firsts[k]
            for page in range(FIRST, count):
                h = _h_page(h_ptr, pair, pairs, piece * MAX_PAGES + page, True, SLICES, MAX_PAGES, CUTS, PAGE)
                more = _b_page(b_ptr, column, pages, row + page * PAGE, width, o, inside, True, PAGE)
                acc += tl.sum(more.to(tl.float32) * (h * weight)[:, None], 0)
    return acc


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


@triton.jit
def _add_kernel(
    r_ptr, y_ptr, g_ptr, x_ptr, squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    tokens, width, parts, pages, adapters,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, NORM: tl.constexpr,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr,
    SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    start = token * 0  # the only slice
    if NORM:
        g = tl.load(g_ptr + o, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        firsts = _first_pages(
            o, inside, token, 0, width, start,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, TOP, FIRST, EARLY, PAGE,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.load(r_ptr + token * width + o, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(y_ptr + (split * tokens + token) * width + o, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        acc = _add_lora(
            acc, firsts, o, inside, token, 0, width, start, h_ptr, b_ptr, tokens, pages,
            TOP, FIRST, EARLY, SLICES, MAX_PAGES, CUTS, PAGE,
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


@triton.jit
def _heads_kernel(
    y_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, length_ptr,
    squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, pages, adapters,
    heads, kv_heads, longest, each, eps, parts, hidden, scale_eps,
    PARTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr, ADAPTED: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr,
    EARLY: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
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
    if ADAPTED:
        firsts_low = _first_pages(
            o_low, inside, token, piece, width, column,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, TOP, FIRST, EARLY, PAGE,
        )  # fmt: skip
        firsts_high = _first_pages(
            o_high, inside, token, piece, width, column,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, TOP, FIRST, EARLY, PAGE,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    low = _partial_sum(y_ptr, token, column, o_low, inside, tokens, width_out, BLOCK, SPLIT)
    high = _partial_sum(y_ptr, token, column, o_high, inside, tokens, width_out, BLOCK, SPLIT)
    if ADAPTED:
        low = _add_lora(
            low, firsts_low, o_low, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages,
            TOP, FIRST, EARLY, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
        high = _add_lora(
            high, firsts_high, o_high, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages,
            TOP, FIRST, EARLY, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    if PARTS > 0:
        of_norm = norm_scale(squares_ptr, token, parts, hidden, scale_eps, PARTS)
        low *= of_norm
        high *= of_norm
    if BIAS:
        low += tl.load(bias_ptr + column + o_low, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias_ptr + column + o_high, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(length_ptr) + token % each
    cell = (((token // each) * kv_heads + head) * longest + length) * (2 * HALF)
    if piece == 2:
        tl.store(values_ptr + cell + i, low.to(values_ptr.dtype.element_ty), mask=inside)
        tl.store(values_ptr + cell + HALF + i, high.to(values_ptr.dtype.element_ty), mask=inside)
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
            tl.store(keys_ptr + cell + i, turned_low.to(keys_ptr.dtype.element_ty), mask=inside)
            tl.store(keys_ptr + cell + HALF + i, turned_high.to(keys_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(
    y_ptr, m_ptr, squares_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    tokens, width, pages, adapters, parts, hidden, scale_eps,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, FIRST: tl.constexpr, EARLY: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    start_gate = token * 0
    start_up = start_gate + width
    if ADAPTED:
        firsts_gate = _first_pages(
            o, inside, token, 0, width, start_gate,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, TOP, FIRST, EARLY, PAGE,
        )  # fmt: skip
        firsts_up = _first_pages(
            o, inside, token, 1, width, start_up,
            b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, TOP, FIRST, EARLY, PAGE,
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
        gate = _add_lora(
            gate, firsts_gate, o, inside, token, 0, width, start_gate, h_ptr, b_ptr, tokens, pages,
            TOP, FIRST, EARLY, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
        up = _add_lora(
            up, firsts_up, o, inside, token, 1, width, start_up, h_ptr, b_ptr, tokens, pages,
            TOP, FIRST, EARLY, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    if PARTS > 0:
        of_norm = norm_scale(squares_ptr, token, parts, hidden, scale_eps, PARTS)
        gate *= of_norm
        up *= of_norm
    m = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(m_ptr + token * width + o, m.to(m_ptr.dtype.element_ty), mask=inside)


def _adapters(
    added: "Added | None", stand_in: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], dict[str, int], int, int]:
    """Pointers, shape constants, and the two sizes of the tables, of what adapters add."""
    if added is None:
        shape = {"ADAPTED": False, "TOP": 1, "FIRST": 1, "SLICES": 1, "MAX_PAGES": 1, "CUTS": 1, "PAGE": PAGE}
        return (stand_in,) * 6, shape, 0, 0
    pages = added.pages
    shape = {
        "ADAPTED": True, "TOP": added.slots.shape[1], "FIRST": min(pages.max_pages, FIRST_PAGES),
        "SLICES": len(pages.outputs), "MAX_PAGES": pages.max_pages, "CUTS": added.h.shape[0], "PAGE": PAGE,
    }  # fmt: skip
    pointers = (added.h, pages.B, added.weights, added.slots, pages.first, pages.count)
    return pointers, shape, pages.pages, pages.slots


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


def _early(numbers: int, warps: int) -> int:
    """Pages (each ``numbers`` in a program) that its threads can hold beside their work."""
    return max(1, 128 * warps * 32 // numbers)


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
    pointers, shape, pages, slots = _adapters(added, residual)
    gain, x, scale = norm if norm is not None else (residual, residual, None)
    parts = triton.cdiv(D, ADD_BLOCK)
    squares = written(scale, parts, residual)
    _add_kernel[(T, parts)](
        residual, y, gain, x, squares, *pointers, T, D, parts, pages, slots,
        SPLIT=y.shape[0], BLOCK=ADD_BLOCK, NORM=norm is not None, EARLY=_early(PAGE * ADD_BLOCK, ADD_WARPS),
        **shape, **launch(pdl), num_warps=ADD_WARPS,
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
    pointers, shape, pages, slots = _adapters(added, q)
    squares, sizes, parts = scale_of(scale, q)
    q_norm, k_norm, eps = norms if norms is not None else (q, q, 0.0)
    _heads_kernel[(T, H + 2 * G)](
        y, q if bias is None else bias, q, keys, values, q_norm, k_norm, *rotary, positions, length,
        squares, *pointers, T, pages, slots, H, G, longest, each, eps, *sizes,
        PARTS=parts, HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), NORM=norms is not None, BIAS=bias is not None,
        SPLIT=y.shape[0], EARLY=_early(PAGE * d, HEADS_WARPS), **shape, **launch(pdl),
        num_warps=HEADS_WARPS,
    )  # fmt: skip


def gate(y: torch.Tensor, m: torch.Tensor, added: "Added | None", pdl: bool, scale: "Scale | None") -> None:
    """Of :func:`molora_kernels.epilogue.gate`."""
    T, width = m.shape
    pointers, shape, pages, slots = _adapters(added, m)
    squares, sizes, parts = scale_of(scale, m)
    block = GATE_BLOCK
    _gate_kernel[(T, triton.cdiv(width, block))](
        y, m, squares, *pointers, T, width, pages, slots, *sizes,
        PARTS=parts, SPLIT=y.shape[0], BLOCK=block, EARLY=_early(2 * PAGE * block, GATE_WARPS),
        **shape, **launch(pdl), num_warps=GATE_WARPS,
    )  # fmt: skip
