"""The cores of compressed adapters in Triton: delta(x) = U b (a (V^T x)).

V^T and U lie in the pages like any adapter's A and B, once for all slots that share them, and what shrinks by A and
expands by B knows no difference. Between the two stands a core of each slot, b a, which changes h where it lies: a
launch for all modules of a group.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.limits import COUNTS
from molora_kernels.pages import PAGE, PageView


@triton.jit(do_not_specialize=COUNTS)
def _core_kernel(
    h_ptr, a_ptr, b_ptr, slots_ptr, count_ptr, core_first_ptr, core_count_ptr,
    pairs, width, pages, adapters,
    SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token, one column of its plan, one slice. A core's two factors lie alike: [slices, pages, PAGE, width]."""
    pair = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    # The plan was written before the kernel before this one, and factors are constants: all are read early.
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    cell = piece * adapters + slot
    count = tl.load(core_count_ptr + cell, mask=slot >= 0, other=0)
    first = tl.load(core_first_ptr + cell, mask=slot >= 0, other=0)
    shrunk = tl.load(count_ptr + cell, mask=slot >= 0, other=0) * PAGE
    i = tl.arange(0, BLOCK)
    rows = ((piece * pages + first).to(tl.int64) * PAGE + tl.arange(0, PAGE))[:, None] * width + i[None, :]
    inside = (i < width)[None, :]
    a = tl.load(a_ptr + rows, mask=inside & (count > 0), other=0.0)
    b = tl.load(b_ptr + rows, mask=inside & (count > 0), other=0.0)
    if PDL:  # of every program, also of one with nothing to do: what waits for this kernel counts on the one before
        gdc_wait()
        gdc_launch_dependents()
    if count > 0:
        at = h_ptr + pair * (SLICES * MAX_PAGES * PAGE) + piece * (MAX_PAGES * PAGE) + i
        stride = pairs.to(tl.int64) * (SLICES * MAX_PAGES * PAGE)
        h = tl.zeros((BLOCK,), tl.float32)
        for cut in tl.static_range(CUTS):
            h += tl.load(at + cut * stride, mask=i < shrunk, other=0.0).to(tl.float32)
        out = tl.sum(b.to(tl.float32) * tl.sum(a.to(tl.float32) * h[None, :], 1)[:, None], 0)
        for page in range(1, count):
            a = tl.load(a_ptr + rows + page * PAGE * width, mask=inside, other=0.0)
            b = tl.load(b_ptr + rows + page * PAGE * width, mask=inside, other=0.0)
            out += tl.sum(b.to(tl.float32) * tl.sum(a.to(tl.float32) * h[None, :], 1)[:, None], 0)
        tl.debug_barrier()  # no thread writes what another has yet to read
        tl.store(at, out.to(h_ptr.dtype.element_ty), mask=i < shrunk)
        for cut in tl.static_range(1, CUTS):
            tl.store(at + cut * stride, tl.zeros((BLOCK,), h_ptr.dtype.element_ty), mask=i < shrunk)


def apply_cores(h: torch.Tensor, pages: PageView, slots: torch.Tensor, pdl: bool = False) -> None:
    """h of each token and column of the plan whose slot has a core becomes b (a h), summed in the first of its parts
    and 0 in the others, in place; that of other slots stays.

    Args:
        h: [parts, T, S, slices x pages x PAGE], of :func:`molora_kernels.shrink.shrink` or
            :func:`molora_kernels.linear.linear`, contiguous.
        pages: with cores.
        slots: [T, S] int32 or int64, contiguous, -1 for none.
        pdl: launch as a programmatic dependent of the kernel that wrote h (Hopper).
    """
    cores = pages.cores
    assert cores is not None
    block = triton.next_power_of_2(-(-cores.inputs // PAGE) * PAGE)
    extra = {"launch_pdl": True} if pdl else {}
    _core_kernel[(slots.numel(), len(pages.outputs))](
        h, cores.A, cores.B, slots, pages.count, cores.first, cores.count,
        slots.numel(), cores.inputs, cores.pages, cores.slots,
        SLICES=len(pages.outputs), MAX_PAGES=pages.max_pages, CUTS=h.shape[0], PAGE=PAGE, BLOCK=block, PDL=pdl,
        num_warps=max(1, block // 64), **extra,
    )  # fmt: skip
