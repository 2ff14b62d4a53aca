"""One token in Triton: what its adapters add to columns of the output, all of its slots at once.

Of a compressed adapter the pages hold A = V^T and B = U^T, and h becomes b (a h) by the slot's core before B multiplies
it. Each program does that for itself, from a core that is read before h is there, so that it takes no launch.
"""

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView

HELD = 512  # bytes of factors that a thread may hold


@triton.jit
def first_rows(
    o, inside, token, piece, width, column, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters, cores,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows of B of the columns ``o`` of slice ``piece``, which begins at ``column`` and is ``width`` wide: of each slot
    of ``token`` the first FIRST pages. All slots are one tile, so that more of them are more rows and not more steps.

    ``cores``: pointers to a, b, first pages and counts of the slots' cores, and how wide and how many pages these are;
    CORE: the most ranks of a core, 0 where there is none.

    Nothing of this is written by the kernel before this one: it is asked for before that one is done. Returns the
    tile, for each row its weight, how many pages its slot has and where they begin, and what a core has for the rows.
    """
    i = tl.arange(0, TOPS * FIRST * PAGE)
    k = i // (FIRST * PAGE)
    slot = tl.load(slots_ptr + token * TOP + k, mask=k < TOP, other=-1).to(tl.int64)
    acts = slot >= 0
    count = tl.load(count_ptr + piece * adapters + slot, mask=acts, other=0)
    first = tl.load(first_ptr + piece * adapters + slot, mask=acts, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + token * TOP + k, mask=acts, other=0.0)
    b = _b_rows(0, first, count, o, inside, width, column, b_ptr, pages, TOPS, FIRST, PAGE)
    core = (count,)
    if CORE > 0:
        ranks = tl.load(cores[3] + piece * adapters + slot, mask=acts, other=0)
        start = tl.load(cores[2] + piece * adapters + slot, mask=acts, other=0)
        # What the compiler cannot see: all rows of a slot have one core, and lie side by side in it.
        ranks, start = tl.max_constancy(ranks, FIRST * PAGE), tl.max_constancy(start, FIRST * PAGE)
        where = (ranks, (piece * cores[5] + start).to(tl.int64) * PAGE)
        a = _core_rows(0, where, cores[0], cores[4], TOPS, FIRST, CORE, PAGE)
        core = (where, a, _core_rows(0, where, cores[1], cores[4], TOPS, FIRST, CORE, PAGE))
    return b, weight, count, first, core


@triton.jit
def _b_rows(
    start, first, count, o, inside, width, column, b_ptr, pages,
    TOPS: tl.constexpr, FIRST: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, TOPS * FIRST * PAGE)
    page = start + i // PAGE % FIRST
    row = (first + page) * PAGE + i % PAGE
    at = column.to(tl.int64) * PAGE * pages + row * width
    return tl.load(b_ptr + at[:, None] + o[None, :], mask=(page < count)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _core_rows(
    start, where, factor_ptr, width, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """[CORE, rows] of one factor of the slots' cores: the columns that belong to FIRST pages from ``start`` on.
    ``where``: how many pages of ranks each has, and the first of its ranks among all."""
    column = start * PAGE + tl.arange(0, TOPS * FIRST * PAGE) % (FIRST * PAGE)
    rank = tl.arange(0, CORE)[:, None]
    at = (where[1][None, :] + rank) * width + column[None, :]
    return tl.load(factor_ptr + at, mask=(rank < where[0][None, :] * PAGE) & (column < width)[None, :], other=0.0)


@triton.jit
def _by_slot(
    rows, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """[CORE, rows] -> [CORE, slots, rows of each], float32."""
    return tl.reshape(rows, (CORE, TOPS, FIRST * PAGE)).to(tl.float32)


@triton.jit
def _into_core(h, a, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, PAGE: tl.constexpr):
    """a h of each slot, [CORE, slots, 1], as far as these rows go."""
    return tl.sum(_by_slot(a.to(tl.float32) * h[None, :], TOPS, FIRST, CORE, PAGE), 2)[:, :, None]


@triton.jit
def _out_of_core(
    h, inner, b, where, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """h, where a slot has a core: b ``inner``."""
    through = tl.reshape(tl.sum(_by_slot(b, TOPS, FIRST, CORE, PAGE) * inner, 0), (TOPS * FIRST * PAGE,))
    return tl.where(where[0] > 0, through, h)


@triton.jit
def _h_rows(
    start, count, token, tokens, piece, h_ptr,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, TOPS * FIRST * PAGE)
    page = start + i // PAGE % FIRST
    h = tl.zeros((TOPS * FIRST * PAGE,), tl.float32)
    for cut in tl.static_range(CUTS):
        pair = (cut * tokens + token) * TOP + i // (FIRST * PAGE)
        at = (pair * SLICES + piece) * (MAX_PAGES * PAGE) + page * PAGE + i % PAGE
        h += tl.load(h_ptr + at, mask=page < count, other=0.0)
    return h


@triton.jit
def add_lora(
    acc, rows, o, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages, cores,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, CORE: tl.constexpr, SLICES: tl.constexpr,
    MAX_PAGES: tl.constexpr, CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """acc plus the adapters' part of the columns ``o``. ``rows``: of :func:`first_rows`."""
    b, weight, count, first, core = rows
    h = _h_rows(0, count, token, tokens, piece, h_ptr, TOP, TOPS, FIRST, SLICES, MAX_PAGES, CUTS, PAGE)
    if CORE > 0:
        inner = _into_core(h, core[1], TOPS, FIRST, CORE, PAGE)
        if MAX_PAGES > FIRST:
            for start in range(FIRST, tl.max(count, 0), FIRST):
                h_more = _h_rows(
                    start, count, token, tokens, piece, h_ptr, TOP, TOPS, FIRST, SLICES, MAX_PAGES, CUTS, PAGE
                )
                a = _core_rows(start, core[0], cores[0], cores[4], TOPS, FIRST, CORE, PAGE)
                inner += _into_core(h_more, a, TOPS, FIRST, CORE, PAGE)
        h = _out_of_core(h, inner, core[2], core[0], TOPS, FIRST, CORE, PAGE)
    acc += tl.sum(b.to(tl.float32) * (h * weight)[:, None], 0)
    if MAX_PAGES > FIRST:
        for start in range(FIRST, tl.max(count, 0), FIRST):
            more = _b_rows(start, first, count, o, inside, width, column, b_ptr, pages, TOPS, FIRST, PAGE)
            h = _h_rows(start, count, token, tokens, piece, h_ptr, TOP, TOPS, FIRST, SLICES, MAX_PAGES, CUTS, PAGE)
            if CORE > 0:
                of_core = _core_rows(start, core[0], cores[1], cores[4], TOPS, FIRST, CORE, PAGE)
                h = _out_of_core(h, inner, of_core, core[0], TOPS, FIRST, CORE, PAGE)
            acc += tl.sum(more.to(tl.float32) * (h * weight)[:, None], 0)
    return acc


def core_ranks(pages: PageView) -> int:
    """CORE of :func:`first_rows`."""
    return 0 if pages.cores is None else triton.next_power_of_2(pages.cores.max_pages) * PAGE


def core_pointers(pages: PageView) -> tuple[torch.Tensor, ...]:
    """Of :func:`first_rows`; some stand-in where no slot has a core."""
    cores = pages if pages.cores is None else pages.cores
    return cores.A, cores.B, cores.first, cores.count


def core_sizes(pages: PageView) -> tuple[int, int]:
    """How wide cores are, and how many pages of them there are in a slice."""
    return (0, 0) if pages.cores is None else (pages.cores.inputs, pages.cores.pages)


def first_pages(pages: PageView, tops: int, columns: int, warps: int, pieces: int = 1) -> int:
    """FIRST of :func:`first_rows`: as many pages of each of ``tops`` slots as a program's threads can hold beside their
    work, of ``columns`` columns in ``pieces`` slices, with what their cores have for them."""
    row = tops * (columns + 2 * pieces * core_ranks(pages)) * pages.B.element_size()
    room = max(1, HELD * warps * 32 // (PAGE * row))
    return min(triton.next_power_of_2(pages.max_pages), 1 << (room.bit_length() - 1))
