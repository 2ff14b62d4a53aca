"""The cores of compressed adapters in Triton, for prompts by block: delta(x) = U b (a (V^T x)).

V^T and U lie in the pages like any adapter's A and B, once for all slots that share them, and what shrinks by A and
expands by B knows no difference. Between the two stands a core of each slot, b a, which changes h where it lies: a
launch for all modules of a group. Token by token the expand does it itself (:mod:`molora_kernels.rows`).
"""

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView


@triton.jit
def _core_kernel(
    h_ptr, a_ptr, b_ptr, slots_ptr, count_ptr, core_first_ptr, core_count_ptr, width, pages, adapters,
    SLICES: tl.constexpr, MAX_PAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token, one column of its plan, one slice. A core's two factors lie alike: [slices, pages, PAGE, width]."""
    pair = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    slot = tl.load(slots_ptr + pair).to(tl.int64)
    cell = piece * adapters + slot
    count = tl.load(core_count_ptr + cell, mask=slot >= 0, other=0)
    if count > 0:
        first = tl.load(core_first_ptr + cell)
        i = tl.arange(0, BLOCK)
        shrunk = i < tl.load(count_ptr + cell) * PAGE
        rows = ((piece * pages + first).to(tl.int64) * PAGE + tl.arange(0, PAGE))[:, None] * width + i[None, :]
        at = h_ptr + pair * (SLICES * MAX_PAGES * PAGE) + piece * (MAX_PAGES * PAGE) + i
        h = tl.load(at, mask=shrunk, other=0.0).to(tl.float32)
        out = tl.zeros((BLOCK,), tl.float32)
        for page in range(count):
            a = tl.load(a_ptr + rows + page * PAGE * width, mask=(i < width)[None, :], other=0.0)
            b = tl.load(b_ptr + rows + page * PAGE * width, mask=(i < width)[None, :], other=0.0)
            out += tl.sum(b.to(tl.float32) * tl.sum(a.to(tl.float32) * h[None, :], 1)[:, None], 0)
        tl.debug_barrier()  # no thread writes what another has yet to read
        tl.store(at, out.to(h_ptr.dtype.element_ty), mask=shrunk)


def apply_cores(h: torch.Tensor, pages: PageView, slots: torch.Tensor) -> None:
    """h of each token and column of the plan whose slot has a core becomes b (a h) in place; that of others stays.

    Args:
        h: [1, T, S, slices x pages x PAGE], of :func:`molora_kernels.shrink.shrink` by block, contiguous.
        pages: with cores.
        slots: [T, S] int32 or int64, contiguous, -1 for none.
    """
    cores = pages.cores
    assert cores is not None and len(h) == 1
    block = triton.next_power_of_2(-(-cores.inputs // PAGE) * PAGE)
    _core_kernel[(slots.numel(), len(pages.outputs))](
        h, cores.A, cores.B, slots, pages.count, cores.first, cores.count, cores.inputs, cores.pages, cores.slots,
        SLICES=len(pages.outputs), MAX_PAGES=pages.max_pages, PAGE=PAGE, BLOCK=block, num_warps=max(1, block // 64),
    )  # fmt: skip
