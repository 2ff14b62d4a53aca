"""A router in Triton: memory, MLP, and the choice of slots, for a decode step or a whole prompt of each sequence.

u = [z, memory], of moving averages (:mod:`molora_kernels.averages`) or of gated ones (:mod:`molora_kernels.gates`);
q = SiLU(W1 u + b1);  logits = W2 q + b2; then, in each layer of the stack that the router decides, the top-k of the
candidates that the sequence allows. Nothing is asked of the device by the host, so both can be captured. A step writes
every tensor where it is, and the next one goes on from it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.affine import affine
from molora_kernels.averages import remember
from molora_kernels.gates import remember_gated, step_gated
from molora_kernels.limits import COUNTS


@dataclass
class RouterWeights:
    """One part of a router; float32, contiguous.

    table: [V, W], z of each token id. decays: [D]. w1: [H, (1 + D) W], or [H, W + all U]. w2: [rows, H]. gates: of each
    layer of a gated memory, which has no decays, as for :func:`molora_kernels.gates.remember_gated`.
    """

    table: torch.Tensor
    decays: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    gates: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def new_memory(self, batch: int) -> torch.Tensor:
        """[batch, D, W], or of a gated memory [batch, (R - 1) W + all U]: the last z, newest first, and each layer's h.
        Zeros."""
        width = self.table.shape[1]
        if not self.gates:
            return self.w1.new_zeros(batch, len(self.decays), width)
        return self.w1.new_zeros(batch, self.gates[0][0].shape[1] - width + self.w1.shape[1] - width)


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
    acts anyway, -1 for none; shares: [N, S] float32, at which weight. routed: [N, L] bool."""

    allowed: torch.Tensor
    forced: torch.Tensor
    shares: torch.Tensor
    routed: torch.Tensor


@dataclass
class StepState:
    """Written by a step. memory: as :meth:`RouterWeights.new_memory`, u: [N, W + memory's], q: [N, H], logits:
    [N, rows] float32. slots: [N, S] int32. weights: [N, S] float32. seen: [N, R W], the z that gates read."""

    memory: torch.Tensor
    u: torch.Tensor
    q: torch.Tensor
    logits: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    seen: torch.Tensor | None = None

    @classmethod
    def new(cls, batch: int, router: RouterWeights, columns: int) -> "StepState":
        device = router.w1.device
        return cls(
            router.new_memory(batch),
            torch.zeros(batch, router.w1.shape[1], device=device),
            torch.zeros(batch, router.w1.shape[0], device=device),
            torch.zeros(batch, router.w2.shape[0], device=device),
            torch.full((batch, columns), -1, dtype=torch.int32, device=device),
            torch.ones(batch, columns, device=device),
            router.w1.new_zeros(batch, router.gates[0][0].shape[1]) if router.gates else None,
        )


@dataclass
class PromptRoutes:
    """What routing N sequences of T tokens gives. z: [N, T, W], memory: after the last token, q: [N, T, H], logits:
    [N, T, rows] float32. slots: [N, T, S] int32. weights: [N, T, S] float32."""

    z: torch.Tensor
    memory: torch.Tensor
    q: torch.Tensor
    logits: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _remember_kernel(
    ids_ptr, real_ptr, table_ptr, decays_ptr, memory_ptr, u_ptr, width,
    DECAYS: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    z = tl.load(table_ptr + tl.load(ids_ptr + n).to(tl.int64) * width + w, mask=w < width, other=0.0)
    real = tl.load(real_ptr + n) != 0
    u = u_ptr + n * ((1 + DECAYS) * width) + w
    tl.store(u, z, mask=w < width)
    for d in tl.static_range(DECAYS):
        cell = memory_ptr + (n * DECAYS + d) * width + w
        old = tl.load(cell, mask=w < width, other=0.0)
        decay = tl.load(decays_ptr + d)
        new = tl.where(real, decay * old + (1.0 - decay) * z, old)
        tl.store(cell, new, mask=w < width)
        tl.store(u + (1 + d) * width, new, mask=w < width)


@triton.jit(do_not_specialize=COUNTS)
def _choose_kernel(
    logits_ptr, rows_ptr, slots_of_ptr, firsts_ptr, columns_ptr, allowed_ptr, forced_ptr, shares_ptr,
    routed_ptr,
    slots_ptr, weights_ptr, rows, candidates, columns, each,
    LAYERS: tl.constexpr, MOST: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    sequence = n // each
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    LOWEST: tl.constexpr = -3.0e38
    for layer in tl.static_range(LAYERS):
        column = tl.load(columns_ptr + layer)
        top = tl.load(columns_ptr + layer + 1) - column
        if tl.load(routed_ptr + sequence * LAYERS + layer) == 0:
            for k in range(top):
                at, given = n * columns + column + k, sequence * columns + column + k
                tl.store(slots_ptr + at, tl.load(forced_ptr + given))
                tl.store(weights_ptr + at, tl.load(shares_ptr + given))
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
                    may = tl.load(allowed_ptr + sequence * candidates + c, mask=c < end, other=0) != 0
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
    pdl: bool = False,
) -> StepState:
    """Routes one token of each of N sequences; writes ``state`` in place.

    Args:
        ids: [N] int, token ids, all below V: they are not looked at on the host.
        real: [N] bool, False at padding, which the memory does not take in.
        router, candidates, choice: as their classes say, on one device, contiguous.
        state: of N sequences; its memory goes on from what is there.
        softmax: top-k weights renormalised over the chosen; else each chosen acts at weight 1, if the router does not
            hold it for worse than the layer's null.
        pdl: as for :func:`molora_kernels.linear.linear`.

    Raises:
        ValueError: ``ids``, ``real``, ``choice`` and ``state`` are not of the same number of sequences.
    """
    N = len(ids)
    if {len(real), len(choice.allowed), len(choice.forced), len(choice.routed), len(state.memory)} != {N}:
        raise ValueError(f"{N} token ids, and masks, selections or a state for another number of sequences.")
    launch = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    width = router.table.shape[1]
    if not router.gates:
        _remember_kernel[(N,)](
            ids, real, router.table, router.decays, state.memory, state.u, width,
            DECAYS=len(router.decays), BLOCK_W=triton.next_power_of_2(width), num_warps=1, **launch,
        )  # fmt: skip
    else:
        assert state.seen is not None
        step_gated(ids, real, router.table, router.gates, state.memory, state.seen, state.u, launch)
    affine(state.u, router.w1, router.b1, state.q, True, launch)
    affine(state.q, router.w2, router.b2, state.logits, False, launch)
    _choose(state.logits, candidates, choice, state.slots, state.weights, softmax, 1, launch)
    return state


def route_prompt(
    ids: torch.Tensor | None,
    real: torch.Tensor,
    router: RouterWeights,
    candidates: Candidates,
    choice: Choice,
    memory: torch.Tensor | None,
    softmax: bool,
) -> PromptRoutes:
    """Routes all tokens of N sequences in five launches; each further layer of a gated memory takes two more, padding
    one.

    Args:
        ids: [N, T] int, token ids, all below V: they are not looked at on the host. None: ``router.table`` is
            [N * T, W], z of each token.
        real: [N, T] bool, False at padding, which the memory does not take in; of any strides.
        router, candidates, choice, softmax: as for :func:`route_step`.
        memory: float32, as :meth:`RouterWeights.new_memory`, what is remembered of tokens before; None: nothing.

    Raises:
        ValueError: ``choice`` is of another number of sequences.
    """
    N, T = real.shape
    if len(choice.allowed) != N:
        raise ValueError(f"{N} sequences, and selections for {len(choice.allowed)}.")
    if not router.gates:
        z, u, memory = remember(router.table, ids, real, router.decays, memory)
    else:
        z, u, memory = remember_gated(router.table, ids, real, router.gates, memory)
    q, logits = u.new_empty(N, T, len(router.w1)), u.new_empty(N, T, len(router.w2))
    launch = {"PDL": False}
    affine(u.flatten(0, 1), router.w1, router.b1, q, True, launch)
    affine(q.flatten(0, 1), router.w2, router.b2, logits, False, launch)
    return PromptRoutes(z, memory, q, logits, *choose(logits, candidates, choice, softmax))


def choose(
    logits: torch.Tensor, candidates: Candidates, choice: Choice, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes a whole prompt by its logits: slots [N, T, S] int32 and weights [N, T, S] float32.

    Args:
        logits: [N, T, rows] float32, contiguous.
        candidates, choice, softmax: as for :func:`route_step`.
    """
    N, T, _ = logits.shape
    slots = torch.empty(N, T, choice.forced.shape[1], dtype=torch.int32, device=logits.device)
    weights = torch.empty(slots.shape, device=logits.device)
    _choose(logits, candidates, choice, slots, weights, softmax, T, {"PDL": False})
    return slots, weights


def _choose(
    logits: torch.Tensor,
    candidates: Candidates,
    choice: Choice,
    slots: torch.Tensor,
    weights: torch.Tensor,
    softmax: bool,
    each: int,
    launch: dict[str, bool],
) -> None:
    columns = slots.shape[-1]
    _choose_kernel[(slots.numel() // columns,)](
        logits, candidates.rows, candidates.slots, candidates.firsts, candidates.columns,
        choice.allowed, choice.forced, choice.shares, choice.routed, slots, weights,
        logits.shape[-1], len(candidates.rows), columns, each,
        LAYERS=len(candidates.firsts) - 1, MOST=triton.next_power_of_2(columns), SOFTMAX=softmax, BLOCK_C=64,
        num_warps=1, **launch,
    )  # fmt: skip
