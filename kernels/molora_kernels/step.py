"""What stands between a decode step's products, in Triton: each kernel takes the partial sums of the product before
it, adds the adapters' expand, and does the base's own work on the result in the same pass.

add_norm: residual and RMSNorm. heads: norm of q and k, rotary position, write to the cache. gate: SiLU(gate) * up.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.pages import PAGE, PageView


@dataclass
class Added:
    """What adapters add to a group's product: their shrink and the plan.

    h: [cuts, T, S, slices x pages x PAGE] float32. slots: [T, S] int32. weights: [T, S] float32.
    """

    h: torch.Tensor
    pages: PageView
    slots: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _lora_columns(
    acc, o, inside, token, piece, width, column,
    h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, pages, adapters,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """acc plus the adapters' part of the columns ``o`` of slice ``piece``, which begins at ``column`` and is ``width``
    wide."""
    b_start = (token * 0 + column) * PAGE * pages  # int64, as token is
    for k in tl.static_range(TOP):
        pair = token * TOP + k
        slot = tl.load(slots_ptr + pair).to(tl.int64)
        if slot >= 0:
            count = tl.load(count_ptr + piece * adapters + slot)
            row = tl.load(first_ptr + piece * adapters + slot).to(tl.int64) * PAGE
            weight = tl.load(weights_ptr + pair)
            for page in range(count):
                for r in tl.static_range(PAGE):
                    h = 0.0
                    for cut in tl.static_range(CUTS):
                        at = (cut * tokens * TOP + pair) * (SLICES * MAX_PAGES * PAGE)
                        h += tl.load(h_ptr + at + (piece * MAX_PAGES + page) * PAGE + r)
                    b = tl.load(b_ptr + b_start + (row + page * PAGE + r) * width + o, mask=inside, other=0.0)
                    acc += b.to(tl.float32) * (h * weight)
    return acc


@triton.jit
def _add_norm_kernel(
    r_ptr, y_ptr, g_ptr, x_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    tokens, width, pages, adapters, eps,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ADAPTED: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    inside = o < width
    g = tl.load(g_ptr + o, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.load(r_ptr + token * width + o, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(y_ptr + (split * tokens + token) * width + o, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        acc = _lora_columns(
            acc, o, inside, token, 0, width, 0, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
            tokens, pages, adapters, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    rounded = acc.to(r_ptr.dtype.element_ty)
    if SPLIT > 0:
        tl.store(r_ptr + token * width + o, rounded, mask=inside)
    acc = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(acc * acc, 0) / width + eps)
    tl.store(x_ptr + token * width + o, (acc * scale * g).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _half(
    half: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    token, piece, column, width, head, y_ptr, bias_ptr,
    h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, width_out, pages, adapters,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    o = head * (2 * HALF) + half * HALF + i
    acc = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        acc = tl.load(bias_ptr + column + o, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(y_ptr + (split * tokens + token) * width_out + column + o, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        acc = _lora_columns(
            acc, o, inside, token, piece, width, column, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
            tokens, pages, adapters, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    return acc


@triton.jit
def _heads_kernel(
    y_ptr, bias_ptr, q_ptr, keys_ptr, values_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, length_ptr,
    h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, pages, adapters,
    heads, kv_heads, longest, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr, ADAPTED: tl.constexpr, TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Which of q, k and v this head belongs to.
    piece = tl.where(row < heads, 0, tl.where(row < heads + kv_heads, 1, 2))
    head = row - tl.where(piece == 0, 0, tl.where(piece == 1, heads, heads + kv_heads))
    column = tl.where(piece == 0, 0, tl.where(piece == 1, heads, heads + kv_heads)) * (2 * HALF)
    width = tl.where(piece == 0, heads, kv_heads) * (2 * HALF)
    width_out = (heads + 2 * kv_heads) * (2 * HALF)
    low = _half(
        0, HALF, BLOCK, token, piece, column, width, head, y_ptr, bias_ptr,
        h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, width_out, pages, adapters,
        SPLIT, BIAS, ADAPTED, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
    )  # fmt: skip
    high = _half(
        1, HALF, BLOCK, token, piece, column, width, head, y_ptr, bias_ptr,
        h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, tokens, width_out, pages, adapters,
        SPLIT, BIAS, ADAPTED, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
    )  # fmt: skip
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    length = tl.load(length_ptr)
    cell = ((token * kv_heads + head) * longest + length) * (2 * HALF)
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
    y_ptr, m_ptr, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
    tokens, width, pages, adapters,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ADAPTED: tl.constexpr,
    TOP: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
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
        gate = _lora_columns(
            gate, o, inside, token, 0, width, 0, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
            tokens, pages, adapters, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
        up = _lora_columns(
            up, o, inside, token, 1, width, width, h_ptr, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr,
            tokens, pages, adapters, TOP, SLICES, MAX_PAGES, CUTS, PAGE,
        )  # fmt: skip
    m = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(m_ptr + token * width + o, m.to(m_ptr.dtype.element_ty), mask=inside)


def _adapters(added: Added | None, stand_in: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, int], int, int]:
    """Pointers, shape constants, and the two sizes of the tables, of what adapters add."""
    if added is None:
        shape = {"ADAPTED": False, "TOP": 1, "SLICES": 1, "MAX_PAGES": 1, "CUTS": 1, "PAGE": PAGE}
        return (stand_in,) * 6, shape, 0, 0
    pages = added.pages
    shape = {
        "ADAPTED": True, "TOP": added.slots.shape[1], "SLICES": len(pages.outputs), "MAX_PAGES": pages.max_pages,
        "CUTS": added.h.shape[0], "PAGE": PAGE,
    }  # fmt: skip
    pointers = (added.h, pages.B, added.weights, added.slots, pages.first, pages.count)
    return pointers, shape, pages.pages, pages.slots


def _launch(pdl: bool) -> dict[str, bool]:
    return {"PDL": pdl, "launch_pdl": True} if pdl else {"PDL": False}


def add_norm(
    residual: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    x: torch.Tensor,
    eps: float,
    added: Added | None = None,
    pdl: bool = False,
) -> None:
    """residual += sum of y + adapters; x = RMSNorm(residual) * gain.

    Args:
        residual: [T, D], read and written.
        y: [split, T, D] partial sums; None: only the norm.
        gain: [D]. x: [T, D], written. eps: of the norm.
        added: what adapters add to y.
        pdl: as for :func:`molora_kernels.linear.linear`.
    """
    T, D = residual.shape
    pointers, shape, pages, slots = _adapters(added, residual)
    block = triton.next_power_of_2(D)
    _add_norm_kernel[(T,)](
        residual, residual if y is None else y, gain, x, *pointers, T, D, pages, slots, eps,
        SPLIT=0 if y is None else y.shape[0], BLOCK=block, **shape, **_launch(pdl),
        num_warps=max(1, min(16, block // 128)),
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
    added: Added | None = None,
    pdl: bool = False,
) -> None:
    """From the product of q, k and v: q to ``q``, k and v to their place in the cache.

    Args:
        y: [split, T, (H + 2 G) d] partial sums. bias: [(H + 2 G) d].
        q: [T, H, d], written.
        keys, values: [T, G, longest, d] contiguous; position ``length`` of each is written.
        norms: gains [d] of the norms of q and k, and their eps; None: there are none.
        rotary: cos and sin [positions, d / 2].
        positions: [T] int64, the rotary position of each token. length: [1] int64.
        added: what adapters add to y.
    """
    T, H, d = q.shape
    G, longest = keys.shape[1], keys.shape[2]
    pointers, shape, pages, slots = _adapters(added, q)
    q_norm, k_norm, eps = norms if norms is not None else (q, q, 0.0)
    _heads_kernel[(T, H + 2 * G)](
        y, q if bias is None else bias, q, keys, values, q_norm, k_norm, *rotary, positions, length,
        *pointers, T, pages, slots, H, G, longest, eps,
        HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2), NORM=norms is not None, BIAS=bias is not None,
        SPLIT=y.shape[0], **shape, **_launch(pdl), num_warps=1,
    )  # fmt: skip


def gate(y: torch.Tensor, m: torch.Tensor, added: Added | None = None, pdl: bool = False) -> None:
    """m = SiLU(gate) * up, of y [split, T, 2 I] partial sums of the product of gate and up; m: [T, I], written."""
    T, width = m.shape
    pointers, shape, pages, slots = _adapters(added, m)
    block = 128
    _gate_kernel[(T, triton.cdiv(width, block))](
        y, m, *pointers, T, width, pages, slots, SPLIT=y.shape[0], BLOCK=block, **shape, **_launch(pdl), num_warps=2,
    )  # fmt: skip
