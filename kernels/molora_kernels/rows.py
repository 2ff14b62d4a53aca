"""One token in Triton: what its adapters add to columns of the output, all of its slots at once."""

import triton
import triton.language as tl


@triton.jit
def first_rows(
    o, inside, token, piece, width, column, b_ptr, weights_ptr, slots_ptr, first_ptr, count_ptr, pages, adapters,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows of B of the columns ``o`` of slice ``piece``, which begins at ``column`` and is ``width`` wide: of each slot
    of ``token`` the first FIRST pages. All slots are one tile, so that more of them are more rows and not more steps.

    Nothing of this is written by the kernel before this one: it is asked for before that one is done. Returns the
    tile, and for each row its weight, how many pages its slot has and where they begin.
    """
    i = tl.arange(0, TOPS * FIRST * PAGE)
    k = i // (FIRST * PAGE)
    slot = tl.load(slots_ptr + token * TOP + k, mask=k < TOP, other=-1).to(tl.int64)
    acts = slot >= 0
    count = tl.load(count_ptr + piece * adapters + slot, mask=acts, other=0)
    first = tl.load(first_ptr + piece * adapters + slot, mask=acts, other=0).to(tl.int64)
    weight = tl.load(weights_ptr + token * TOP + k, mask=acts, other=0.0)
    b = _b_rows(0, first, count, o, inside, width, column, b_ptr, pages, TOPS, FIRST, PAGE)
    return b, weight, count, first


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
    acc, rows, o, inside, token, piece, width, column, h_ptr, b_ptr, tokens, pages,
    TOP: tl.constexpr, TOPS: tl.constexpr, FIRST: tl.constexpr, SLICES: tl.constexpr, MAX_PAGES: tl.constexpr,
    CUTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """acc plus the adapters' part of the columns ``o``. ``rows``: of :func:`first_rows`."""
    b, weight, count, first = rows
    h = _h_rows(0, count, token, tokens, piece, h_ptr, TOP, TOPS, FIRST, SLICES, MAX_PAGES, CUTS, PAGE)
    acc += tl.sum(b.to(tl.float32) * (h * weight)[:, None], 0)
    if MAX_PAGES > FIRST:
        for start in range(FIRST, tl.max(count, 0), FIRST):
            more = _b_rows(start, first, count, o, inside, width, column, b_ptr, pages, TOPS, FIRST, PAGE)
            h = _h_rows(start, count, token, tokens, piece, h_ptr, TOP, TOPS, FIRST, SLICES, MAX_PAGES, CUTS, PAGE)
            acc += tl.sum(more.to(tl.float32) * (h * weight)[:, None], 0)
    return acc
