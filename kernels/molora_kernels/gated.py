"""LoRA with a gate for each token and rank, over weights that lie as vLLM keeps them: y += B (g * A x).

A token's slot holds all adapters of its stack side by side in the ranks. A program asks which blocks of ranks its
tokens use, and reads no weight of the others: many adapters cost what those cost that act. Tokens come sorted by slot,
as vLLM sorts them. Shapes follow from the number of tokens alone, so a captured graph goes on under other gates.
"""

import torch
import triton
import triton.language as tl

PAGE = 16
"""Ranks for which a token's ``acts`` has one bit."""
FEW = 256
"""Tokens up to which the sum over the inputs is cut into parts, as there are too few programs otherwise."""


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _of(piece, first, second, third):
    """What slice ``piece`` has."""
    found = first
    if piece == 1:
        found = second
    if piece == 2:
        found = third
    return found


@triton.jit
def _mine(place, order_ptr, acts_ptr, slots_ptr, counts_ptr, starts_ptr, BLOCK_T: tl.constexpr):
    """The slot of a program (-1: it has nothing to do), its tokens, which of them there are, and the bits that they
    set."""
    group = tl.program_id(2)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    count = tl.load(counts_ptr + group, mask=slot >= 0, other=0)
    at = place * BLOCK_T + tl.arange(0, BLOCK_T)
    here = at < count
    token = tl.load(order_ptr + tl.load(starts_ptr + group) + at, mask=here, other=0).to(tl.int64)
    acts = tl.load(acts_ptr + token, mask=here, other=0)
    return slot, token, here, tl.reduce(acts, 0, _either)


@triton.jit(do_not_specialize=["tokens"])
def _gated_shrink_kernel(
    x_ptr, a_ptr, a1_ptr, a2_ptr, h_ptr, acts_ptr, order_ptr, slots_ptr, counts_ptr, starts_ptr,
    tokens, width_in, ranks, stride_x,
    SLICES: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(ranks, BLOCK_R)
    block = tl.program_id(0) % blocks
    slot, token, here, acts = _mine(
        tl.program_id(0) // blocks, order_ptr, acts_ptr, slots_ptr, counts_ptr, starts_ptr, BLOCK_T
    )
    if (acts >> (block * (BLOCK_R // PAGE))) & ((1 << (BLOCK_R // PAGE)) - 1) == 0:
        return
    piece = tl.program_id(1) // SPLIT
    split = tl.program_id(1) % SPLIT
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < ranks
    rows = _of(piece, a_ptr, a1_ptr, a2_ptr) + (slot * ranks + r) * width_in
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(split * BLOCK_D, width_in, SPLIT * BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = d < width_in
        x = tl.load(x_ptr + token[:, None] * stride_x + d[None, :], mask=here[:, None] & there[None, :], other=0.0)
        a = tl.load(rows[None, :] + d[:, None], mask=there[:, None] & inside[None, :], other=0.0)
        if UPCAST:
            x, a = x.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    cells = ((split * SLICES + piece) * tokens + token)[:, None] * ranks + r[None, :]
    tl.store(h_ptr + cells, acc, mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _gated_expand_kernel(
    y_ptr, h_ptr, b_ptr, b1_ptr, b2_ptr, weights_ptr, acts_ptr, order_ptr, slots_ptr, counts_ptr, starts_ptr,
    tokens, ranks, stride_y, stride_gate, offset, width, width1, width2,
    SLICES: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1)
    own = _of(piece, width, width1, width2)
    columns = tl.cdiv(tl.maximum(width, tl.maximum(width1, width2)), BLOCK_O)
    first = tl.program_id(0) % columns * BLOCK_O
    slot, token, here, acts = _mine(
        tl.program_id(0) // columns, order_ptr, acts_ptr, slots_ptr, counts_ptr, starts_ptr, BLOCK_T
    )
    if (acts == 0) | (first >= own):
        return
    o = first + tl.arange(0, BLOCK_O)
    wide = o < own
    rows = _of(piece, b_ptr, b1_ptr, b2_ptr) + (slot * own + o) * ranks
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for block in range(tl.cdiv(ranks, BLOCK_R)):
        if (acts >> (block * (BLOCK_R // PAGE))) & ((1 << (BLOCK_R // PAGE)) - 1) != 0:
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = r < ranks
            cells = here[:, None] & inside[None, :]
            # All loads before the first use: none waits for another.
            b = tl.load(rows[None, :] + r[:, None], mask=inside[:, None] & wide[None, :], other=0.0)
            gate = tl.load(weights_ptr + token[:, None] * stride_gate + r[None, :], mask=cells, other=0.0)
            h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for split in tl.static_range(SPLIT):
                at = ((split * SLICES + piece) * tokens + token)[:, None] * ranks + r[None, :]
                h += tl.load(h_ptr + at, mask=cells, other=0.0)
            h = tl.where(gate != 0, h * gate, 0.0)  # where the gate is 0 nothing may have been written
            if UPCAST:
                b = b.to(tl.float32)
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
    column = offset
    if piece > 0:
        column += width
    if piece > 1:
        column += width1
    at = y_ptr + token[:, None] * stride_y + (column + o)[None, :]
    cells = here[:, None] & wide[None, :]
    if ADD:
        acc += tl.load(at, mask=cells, other=0.0).to(tl.float32)
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=cells)


@triton.jit
def _open_gates_kernel(gates_ptr, acts_ptr, places_ptr, ranks, stride_gate, BLOCK_R: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    there = tl.load(places_ptr + token) >= 0
    r = tl.arange(0, BLOCK_R)
    tl.store(
        gates_ptr + token * stride_gate + r, tl.zeros((BLOCK_R,), tl.float32) + tl.where(there, 1.0, 0.0), r < ranks
    )
    tl.store(acts_ptr + token, tl.where(there, -1, 0).to(tl.int64))


@triton.jit
def _route_gates_kernel(
    gates_ptr, acts_ptr, at_ptr, slots_of_ptr, weights_ptr, owners_ptr, ranks, owned, stride_gate,
    TOP: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(at_ptr + n)
    r = tl.arange(0, BLOCK_R)
    owner = tl.load(owners_ptr + r, mask=r < owned, other=-1)
    gate = tl.zeros((BLOCK_R,), tl.float32)
    for k in tl.static_range(TOP):
        slot = tl.load(slots_of_ptr + n * TOP + k)
        slot = tl.where(slot < 0, -2, slot)
        gate += tl.where(owner == slot, tl.load(weights_ptr + n * TOP + k), 0.0)
    tl.store(gates_ptr + token * stride_gate + r, gate, r < ranks)
    used = tl.max(tl.reshape((gate != 0).to(tl.int64), (BLOCK_R // PAGE, PAGE)), 1)
    tl.store(acts_ptr + token, tl.sum(used << tl.arange(0, BLOCK_R // PAGE), 0))


def open_gates(gates: torch.Tensor, acts: torch.Tensor, places: torch.Tensor) -> None:
    """Writes, for tokens of no stack, the gates [T or more, R] float32 and ``acts`` [T or more] int64, of which bit k
    says that ranks from k * PAGE on are used: all ranks where ``places`` [T] int64 is not negative, else none."""
    ranks = gates.shape[1]
    block = max(PAGE, triton.next_power_of_2(ranks))
    _open_gates_kernel[(len(places),)](gates, acts, places, ranks, gates.stride(0), BLOCK_R=block, num_warps=1)


def route_gates(
    gates: torch.Tensor,
    acts: torch.Tensor,
    at: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    owners: torch.Tensor,
) -> None:
    """Writes what :func:`open_gates` does for the tokens of a stack: a rank's gate is the weight of its adapter.

    Args:
        gates: [T or more, R] float32.
        acts: [T or more] int64.
        at: [N] int64, the tokens, contiguous as those that follow.
        slots: [N, S] int64, the adapters that act on each, -1: none.
        weights: [N, S] float32.
        owners: [R or fewer] int64, the adapter that has each rank; ranks beyond have none.
    """
    ranks = gates.shape[1]
    _route_gates_kernel[(len(at),)](
        gates, acts, at, slots, weights, owners, ranks, len(owners), gates.stride(0),
        TOP=slots.shape[1], PAGE=PAGE, BLOCK_R=max(PAGE, triton.next_power_of_2(ranks)), num_warps=1,
    )  # fmt: skip


def add_gated(
    y: torch.Tensor,
    x: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    gates: torch.Tensor,
    acts: torch.Tensor,
    order: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    offset: int = 0,
    add: bool = True,
) -> None:
    """y += B (gates * A x) in place, for the tokens that have a slot.

    Args:
        y: [T, columns], rows contiguous.
        x: [T, D], rows contiguous.
        A: of one to three slices [slots, 1, R, D], contiguous.
        B: of each slice [slots, 1, O, R], contiguous.
        gates: [T or more, R] float32, rows contiguous.
        acts: [T or more] int64, of :func:`open_gates` and :func:`route_gates`.
        order: [T] the tokens, those of a slot beside each other.
        slots: [groups] the slot of each group of tokens, -1: none.
        counts: [groups or more] how many tokens each group has.
        starts: [groups or more] where each begins in ``order``.
        offset: the column of y at which the first slice begins; the others follow it.
        add: else the sum is not added to y, but written there.
    """
    T, D = x.shape
    slices, ranks = len(A), A[0].shape[-2]
    few = T <= FEW
    split = min(8, -(-D // 256)) if few else 1
    h = torch.empty((split, slices, T, ranks), dtype=torch.float32, device=x.device)
    widths = [b.shape[-2] for b in B] + [0] * (3 - slices)
    As, Bs = ([*some, *some[:1] * (3 - slices)] for some in (A, B))
    block_t, block_r = (16, 16) if few else (64, min(64, max(16, triton.next_power_of_2(ranks))))
    shape = {"SLICES": slices, "SPLIT": split, "PAGE": PAGE, "BLOCK_T": block_t, "BLOCK_R": block_r}
    shape["UPCAST"] = x.device.type == "cpu"  # Triton's interpreter gets half precision wrong
    of = (acts, order, slots, counts, starts)
    tiles, block_o, block_d = triton.cdiv(T, block_t), 64 if few else 128, (512 if few else 128) // x.element_size()
    _gated_shrink_kernel[(tiles * triton.cdiv(ranks, block_r), slices * split, len(slots))](
        x, *As, h, *of, T, D, ranks, x.stride(0), **shape, BLOCK_D=block_d, num_warps=4
    )
    _gated_expand_kernel[(tiles * triton.cdiv(max(widths), block_o), slices, len(slots))](
        y, h, *Bs, gates, *of, T, ranks, y.stride(0), gates.stride(0), offset, *widths,
        **shape, ADD=add, BLOCK_O=block_o, num_warps=4,
    )  # fmt: skip
