"""One decode step of a router in one Triton kernel: memory, MLP, and the choice of slots, for each sequence.

u = [z, m_1, ..., m_D] with m_d = decay_d m_d + (1 - decay_d) z;  q = SiLU(W1 u + b1);  logits = W2 q + b2; then, in
each layer of the stack that the router decides, the top-k of the candidates that the sequence allows. Nothing is asked
of the device by the host, and every tensor is written where it is: the step can be captured, and the next one goes on
from it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass
class RouterWeights:
    """One part of a router, float32. table: [V, W], z of each token id. w1: [H, (1 + D) W]. w2: [rows, H]."""

    table: torch.Tensor
    decays: torch.Tensor  # [D]
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


@dataclass
class Candidates:
    """The stack's candidates, layer after layer, each layer's null last; int32.

    rows: [C], the router's row of each. slots: [C], -1 for a null. firsts: [L + 1], where each layer begins among
    them. columns: [L + 1], where it begins among the S columns of a plan, so that columns[l + 1] - columns[l] is its k.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    firsts: torch.Tensor
    columns: torch.Tensor


@dataclass
class Choice:
    """What the selections of N sequences leave to the router. allowed: [N, C] bool. forced: [N, S] int32, the slot that
    acts anyway, -1 for none. routed: [N, L] bool."""

    allowed: torch.Tensor
    forced: torch.Tensor
    routed: torch.Tensor


@dataclass
class StepState:
    """Written by a step. memory: [N, D, W] float32. q: [N, H], logits: [N, rows] float32. slots: [N, S] int32.
    weights: [N, S] float32."""

    memory: torch.Tensor
    q: torch.Tensor
    logits: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def new(cls, batch: int, router: RouterWeights, columns: int) -> "StepState":
        device, width = router.w1.device, router.table.shape[1]
        return cls(
            torch.zeros(batch, len(router.decays), width, device=device),
            torch.zeros(batch, router.w1.shape[0], device=device),
            torch.zeros(batch, router.w2.shape[0], device=device),
            torch.full((batch, columns), -1, dtype=torch.int32, device=device),
            torch.ones(batch, columns, device=device),
        )


@triton.jit
def _route_step_kernel(
    ids_ptr, real_ptr, table_ptr, decays_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    rows_ptr, slots_of_ptr, firsts_ptr, columns_ptr, allowed_ptr, forced_ptr, routed_ptr,
    memory_ptr, q_ptr, logits_ptr, slots_ptr, weights_ptr,
    width, hidden, rows, candidates, columns,
    DECAYS: tl.constexpr, LAYERS: tl.constexpr, MOST: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    z = tl.load(table_ptr + tl.load(ids_ptr + n).to(tl.int64) * width + w, mask=w < width, other=0.0)
    real = tl.load(real_ptr + n) != 0
    for d in tl.static_range(DECAYS):
        cell = memory_ptr + (n * DECAYS + d) * width + w
        old = tl.load(cell, mask=w < width, other=0.0)
        decay = tl.load(decays_ptr + d)
        new = tl.where(real, decay * old + (1.0 - decay) * z, old)
        tl.store(cell, new, mask=w < width)
    tl.debug_barrier()
    for start in range(0, hidden, BLOCK_H):
        j = start + tl.arange(0, BLOCK_H)
        here = j < hidden
        rows_of_w1 = w1_ptr + j[:, None] * ((1 + DECAYS) * width) + w[None, :]
        mask = here[:, None] & (w < width)[None, :]
        q = tl.load(b1_ptr + j, mask=here, other=0.0)
        q += tl.sum(tl.load(rows_of_w1, mask=mask, other=0.0) * z[None, :], 1)
        for d in tl.static_range(DECAYS):
            m = tl.load(memory_ptr + (n * DECAYS + d) * width + w, mask=w < width, other=0.0)
            q += tl.sum(tl.load(rows_of_w1 + (1 + d) * width, mask=mask, other=0.0) * m[None, :], 1)
        tl.store(q_ptr + n * hidden + j, q / (1.0 + tl.exp(-q)), mask=here)
    tl.debug_barrier()
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        logit = tl.load(b2_ptr + r, mask=r < rows, other=0.0)
        for first in range(0, hidden, BLOCK_H):
            j = first + tl.arange(0, BLOCK_H)
            q = tl.load(q_ptr + n * hidden + j, mask=j < hidden, other=0.0)
            part = tl.load(
                w2_ptr + r[:, None] * hidden + j[None, :], mask=(r < rows)[:, None] & (j < hidden)[None, :], other=0.0
            )
            logit += tl.sum(part * q[None, :], 1)
        tl.store(logits_ptr + n * rows + r, logit, mask=r < rows)
    tl.debug_barrier()
    LOWEST: tl.constexpr = -3.0e38
    for layer in tl.static_range(LAYERS):
        column = tl.load(columns_ptr + layer)
        top = tl.load(columns_ptr + layer + 1) - column
        if tl.load(routed_ptr + n * LAYERS + layer) == 0:
            for k in range(top):
                at = n * columns + column + k
                tl.store(slots_ptr + at, tl.load(forced_ptr + at))
                tl.store(weights_ptr + at, 1.0)
        else:
            first = tl.load(firsts_ptr + layer)
            end = tl.load(firsts_ptr + layer + 1)
            null = tl.load(logits_ptr + n * rows + tl.load(rows_ptr + end - 1))
            # The k-th best is the best of those that come after the one before it, by value, then by position.
            value, position = -LOWEST, -1
            best, total = LOWEST, 0.0
            for k in range(top):
                new_value, new_position = LOWEST, end
                for start in range(first, end, BLOCK_C):
                    c = start + tl.arange(0, BLOCK_C)
                    row = tl.load(rows_ptr + c, mask=c < end, other=0)
                    v = tl.load(logits_ptr + n * rows + row, mask=c < end, other=LOWEST)
                    may = tl.load(allowed_ptr + n * candidates + c, mask=c < end, other=0) != 0
                    may = may & (c < end) & ((v < value) | ((v == value) & (c > position)))
                    v = tl.where(may, v, LOWEST)
                    highest = tl.max(v, 0)
                    if highest > new_value:
                        new_value = highest
                        new_position = tl.min(tl.where(v == highest, c, end), 0)
                value, position = new_value, new_position
                best = tl.where(k == 0, value, best)
                slot = tl.load(slots_of_ptr + position, mask=position < end, other=-1)
                weight = 1.0
                if SOFTMAX:
                    weight = tl.where(position < end, tl.exp(value - best), 0.0)
                    total += weight
                else:
                    slot = tl.where(value < null, -1, slot)
                at = n * columns + column + k
                tl.store(slots_ptr + at, slot)
                tl.store(weights_ptr + at, weight)
            if SOFTMAX:
                tl.debug_barrier()
                chosen = tl.arange(0, MOST)
                mine = weights_ptr + n * columns + column + chosen
                tl.store(mine, tl.load(mine, mask=chosen < top, other=0.0) / total, mask=chosen < top)


def route_step(
    ids: torch.Tensor,
    real: torch.Tensor,
    router: RouterWeights,
    candidates: Candidates,
    choice: Choice,
    state: StepState,
    softmax: bool,
) -> StepState:
    """Routes one token of each of N sequences; writes ``state`` in place.

    Args:
        ids: [N] int, token ids, all below V: they are not looked at on the host.
        real: [N] bool, False at padding, which the memory does not take in.
        router, candidates, choice: as their classes say, on one device, contiguous.
        state: of N sequences; its memory goes on from what is there.
        softmax: top-k weights renormalised over the chosen; else each chosen acts at weight 1, if the router does not
            hold it for worse than the layer's null.

    Raises:
        ValueError: ``ids``, ``real``, ``choice`` and ``state`` are not of the same number of sequences.
    """
    N, L, S = len(ids), len(candidates.firsts) - 1, choice.forced.shape[1]
    if {len(real), len(choice.allowed), len(choice.forced), len(choice.routed), len(state.memory)} != {N}:
        raise ValueError(f"{N} token ids, and masks, selections or a state for another number of sequences.")
    width, hidden = router.table.shape[1], router.w1.shape[0]
    _route_step_kernel[(N,)](
        ids, real, router.table, router.decays, router.w1, router.b1, router.w2, router.b2,
        candidates.rows, candidates.slots, candidates.firsts, candidates.columns,
        choice.allowed, choice.forced, choice.routed,
        state.memory, state.q, state.logits, state.slots, state.weights,
        width, hidden, router.w2.shape[0], len(candidates.rows), S,
        DECAYS=len(router.decays), LAYERS=L, MOST=triton.next_power_of_2(S), SOFTMAX=softmax,
        BLOCK_W=triton.next_power_of_2(width), BLOCK_H=32, BLOCK_R=16, BLOCK_C=64, num_warps=8,
    )  # fmt: skip
    return state
