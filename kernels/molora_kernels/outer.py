"""Gradients of factors in Triton: G_s = sum over (t, k) with slots(t, k) = s of w(t, k) u(t, k)^T v(t).

With u = dh and v = x it is dA, with u = h and v = dy it is dB. Pairs come sorted by slot, so a program walks along the
pairs of its own slot: no atomics, and slots without tokens cost an empty program.
"""

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView


@triton.jit
def _outer_kernel(
    g_ptr, u_ptr, v_ptr, weights_ptr, pairs_ptr, starts_ptr, first_ptr, count_ptr,
    width, stride_u, stride_v,
    TOP: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    page = tl.program_id(1)
    if page >= tl.load(count_ptr + slot):
        return
    start = tl.load(starts_ptr + slot)
    end = tl.load(starts_ptr + slot + 1)
    ranks = tl.arange(0, PAGE)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((PAGE, BLOCK_D), tl.float32)
    for at in range(start, end, BLOCK_T):
        place = at + tl.arange(0, BLOCK_T)
        here = place < end
        pair = tl.load(pairs_ptr + place, mask=here, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=here, other=0.0)
        u = tl.load(
            u_ptr + pair[None, :] * stride_u + page * PAGE + ranks[:, None], mask=here[None, :], other=0.0
        )  # [PAGE, BLOCK_T]
        v = tl.load(
            v_ptr + (pair // TOP)[:, None] * stride_v + d[None, :], mask=here[:, None] & (d < width)[None, :], other=0.0
        )
        u = u * weight[None, :]
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(u.to(v.dtype), v, acc, input_precision="ieee")
    row = (tl.load(first_ptr + slot) + page).to(tl.int64) * PAGE
    tl.store(
        g_ptr + (row + ranks)[:, None] * width + d[None, :],
        acc.to(g_ptr.dtype.element_ty),
        mask=(d < width)[None, :],
    )


def pairs_by_slot(slots: torch.Tensor, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs [T * S] int64 sorted by slot, and where each slot's begin, [bound + 1] int64; no host synchronisation."""
    ordered, pairs = slots.flatten().sort(stable=True)
    return pairs, torch.searchsorted(ordered, torch.arange(bound + 1, device=slots.device, dtype=ordered.dtype))


def outer(
    gradient: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    by_slot: tuple[torch.Tensor, torch.Tensor],
    pages: PageView,
    index: int,
    upcast: bool,
) -> torch.Tensor:
    """Writes the rows of ``gradient`` that adapters own.

    Args:
        gradient: [pages, PAGE, W], contiguous.
        u: [T, S, >= max_pages x PAGE] float32, last dimension contiguous.
        v: [T, W], rows contiguous.
        weights: [T, S] float32, contiguous.
        by_slot: of :func:`pairs_by_slot`.
        pages: the adapters.
        index: of the slice.
        upcast: as for :func:`molora_kernels.shrink.shrink`.
    """
    width, block = v.shape[1], 128
    pairs, starts = by_slot
    _outer_kernel[(pages.slots, pages.max_pages, triton.cdiv(width, block))](
        gradient, u, v, weights, pairs, starts, pages.first[index], pages.count[index],
        width, u.stride(1), v.stride(0),
        TOP=u.shape[1], PAGE=PAGE, BLOCK_T=64, BLOCK_D=block, UPCAST=upcast, num_warps=4,
    )  # fmt: skip
    return gradient
