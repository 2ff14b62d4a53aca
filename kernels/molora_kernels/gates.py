"""A router's gated memory in Triton: each layer takes two launches for a whole prompt, and one for a decode step.

(g~_t, c_t) = V x_t + b and g_t = sigmoid(g~_t), where x_t is the z of the last R real tokens, newest first, and above
the first layer also the h_t of the one below; h_t = (1 - g_t) h_{t-1} + g_t c_t at each real token, h_t = h_{t-1} at
padding. The state of a sequence is the z of its last R - 1 real tokens, newest first, and each layer's h.

In a prompt, chunks of tokens are scanned side by side from nothing; then each adds what those before it leave.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.affine import FEW, precision
from molora_kernels.averages import _is_real
from molora_kernels.limits import COUNTS

CHUNK = 64  # tokens: all of V is read for each
FEW_UNITS = 8  # that a program opens at once, of few tokens


@triton.jit
def _then(keep, h, later_keep, later_h):
    """Two stretches of tokens as one: what it keeps of before it, and what it adds."""
    return keep * later_keep, h * later_keep + later_h


@triton.jit(do_not_specialize=COUNTS)
def _places_kernel(real_ptr, places_ptr, count_ptr, tokens, real_n, real_t, BLOCK_T: tl.constexpr):
    """The places of a sequence's real tokens, one after the other, and how many there are up to each token."""
    n = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        real = (tl.load(real_ptr + n * real_n + t * real_t, mask=t < tokens, other=0) != 0).to(tl.int32)
        count = before + tl.cumsum(real, 0)
        tl.store(count_ptr + n * tokens + t, count, mask=t < tokens)
        tl.store(places_ptr + n * tokens + count - 1, t, mask=real != 0)
        before += tl.sum(real, 0)


@triton.jit(do_not_specialize=COUNTS)
def _chunks_kernel(
    table_ptr, ids_ptr, z_ptr, real_ptr, places_ptr, count_ptr, start_ptr, gates_ptr, bias_ptr,
    u_ptr, keep_ptr, kept_ptr, ends_ptr,
    tokens, width, units, below, column, stride_u, stride_state, chunks, real_n, real_t,
    REACH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's h from nothing, into u at ``column``, and how much of what was before each token keeps. The layer below
    has ``below`` units, before that column. The first layer copies z from the table, if there are ids, and into u."""
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = tl.arange(0, CHUNK)
    t = chunk * CHUNK + i
    inside = t < tokens
    unit = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    mine = unit < units
    token = n * tokens + t
    state = start_ptr
    if start_ptr is not None:
        state += n * stride_state
    inputs = REACH * width + below
    real = _is_real(n, t, real_ptr, tokens, real_n, real_t)
    count = tl.where(real != 0, t + 1, 0) if count_ptr is None else tl.load(count_ptr + token, mask=inside, other=0)
    gate = tl.zeros((CHUNK, BLOCK_U), tl.float32)
    candidate = tl.zeros((CHUNK, BLOCK_U), tl.float32)
    for k in tl.static_range(REACH):
        number = count - 1 - k
        there = inside & (number >= 0)
        if k == 0:
            place = t
            there = inside
        else:
            place = number if places_ptr is None else tl.load(places_ptr + n * tokens + number, mask=there, other=0)
        row = n * tokens + place
        if ids_ptr is not None:
            row = tl.load(ids_ptr + row, mask=there, other=0).to(tl.int64)
        for first in range(0, width, BLOCK_W):
            w = first + tl.arange(0, BLOCK_W)
            if ids_ptr is None:
                z = tl.load(
                    z_ptr + row[:, None] * width + w[None, :], mask=there[:, None] & (w < width)[None, :], other=0.0
                )
            else:
                z = tl.load(
                    table_ptr + row[:, None] * width + w[None, :], mask=there[:, None] & (w < width)[None, :], other=0.0
                )
            if k == 0:
                if below == 0 and tl.program_id(2) == 0:
                    here = inside[:, None] & (w < width)[None, :]
                    tl.store(u_ptr + token[:, None] * stride_u + w[None, :], z, mask=here)
                    if ids_ptr is not None:
                        tl.store(z_ptr + token[:, None] * width + w[None, :], z, mask=here)
                z = tl.where(real[:, None] != 0, z, 0.0)  # whatever padding holds
            elif start_ptr is not None:
                old = inside & (number < 0) & (number >= 1 - REACH)
                z += tl.load(
                    state + (-1 - number)[:, None] * width + w[None, :],
                    mask=old[:, None] & (w < width)[None, :], other=0.0,
                )  # fmt: skip
            at = unit[None, :] * inputs + (k * width + w)[:, None]
            takes = mine[None, :] & (w < width)[:, None]
            gate = tl.dot(z, tl.load(gates_ptr + at, mask=takes, other=0.0), gate, input_precision=PRECISION)
            at += units * inputs
            candidate = tl.dot(z, tl.load(gates_ptr + at, mask=takes, other=0.0), candidate, input_precision=PRECISION)
    for first in range(0, below, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        lower = u_ptr + token[:, None] * stride_u + (column - below + w)[None, :]
        h = tl.load(lower, mask=inside[:, None] & (w < below)[None, :], other=0.0)
        at = unit[None, :] * inputs + (REACH * width + w)[:, None]
        takes = mine[None, :] & (w < below)[:, None]
        gate = tl.dot(h, tl.load(gates_ptr + at, mask=takes, other=0.0), gate, input_precision=PRECISION)
        at += units * inputs
        candidate = tl.dot(h, tl.load(gates_ptr + at, mask=takes, other=0.0), candidate, input_precision=PRECISION)
    gate += tl.load(bias_ptr + unit, mask=mine, other=0.0)[None, :]
    candidate += tl.load(bias_ptr + units + unit, mask=mine, other=0.0)[None, :]
    opens = real[:, None] / (1.0 + tl.exp(-gate))  # at padding, and past the last token, all is kept
    keeps = tl.where(real[:, None] != 0, 1.0 / (1.0 + tl.exp(gate)), 1.0)  # not 1 - opens: exact where little is kept
    keeps, h = tl.associative_scan((keeps, opens * candidate), 0, _then)
    here = inside[:, None] & mine[None, :]
    tl.store(u_ptr + token[:, None] * stride_u + column + unit[None, :], h, mask=here)
    tl.store(keep_ptr + token[:, None] * units + unit[None, :], keeps, mask=here)
    end = (n * chunks + chunk) * units + unit
    last = (i == CHUNK - 1)[:, None]
    tl.store(kept_ptr + end, tl.sum(tl.where(last, keeps, 0.0), 0), mask=mine)
    tl.store(ends_ptr + end, tl.sum(tl.where(last, h, 0.0), 0), mask=mine)


@triton.jit(do_not_specialize=COUNTS)
def _carry_kernel(
    z_ptr, real_ptr, places_ptr, count_ptr, start_ptr, keep_ptr, kept_ptr, ends_ptr, u_ptr, state_ptr,
    tokens, width, units, below, column, stride_u, stride_state, chunks, real_n, real_t,
    REACH: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Adds to a chunk's h what is left of before it; the last chunk writes the state, the first layer's also its z."""
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    unit = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    mine = unit < units
    state = n * stride_state
    own = state + (REACH - 2) * width + column  # of this layer's h: u begins with one z, the state with R - 1
    carried = tl.zeros((BLOCK_U,), tl.float32)
    if start_ptr is not None:
        carried = tl.load(start_ptr + own + unit, mask=mine, other=0.0)
    for first in range(0, chunk, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = (n * chunks + c)[:, None] * units + unit[None, :]
        before = (c < chunk)[:, None] & mine[None, :]
        kept = tl.load(kept_ptr + at, mask=before, other=1.0)
        ends = tl.load(ends_ptr + at, mask=before, other=0.0)
        kept, ends = tl.associative_scan((kept, ends), 0, _then)
        last = (c == first + BLOCK_C - 1)[:, None]
        kept, ends = tl.sum(tl.where(last, kept, 0.0), 0), tl.sum(tl.where(last, ends, 0.0), 0)
        carried = carried * kept + ends
    here = (t < tokens)[:, None] & mine[None, :]
    token = n * tokens + t
    at = token[:, None] * stride_u + column + unit[None, :]
    keep = tl.load(keep_ptr + token[:, None] * units + unit[None, :], mask=here, other=0.0)
    h = tl.load(u_ptr + at, mask=here, other=0.0) + keep * carried[None, :]
    tl.store(u_ptr + at, h, mask=here)
    if chunk == chunks - 1:
        last = tl.sum(tl.where((t == tokens - 1)[:, None], h, 0.0), 0)
        tl.store(state_ptr + own + unit, last, mask=mine)
        if below == 0 and tl.program_id(2) == 0:
            if count_ptr is None:
                total = tl.where(tl.load(real_ptr + n * real_n) != 0, tokens, 0)
            else:
                total = tl.load(count_ptr + n * tokens + tokens - 1)
            for k in tl.static_range(REACH - 1):
                number = total - 1 - k
                place = number
                if places_ptr is not None:
                    place = tl.load(places_ptr + n * tokens + number, mask=number >= 0, other=0)
                for first in range(0, width, BLOCK_W):
                    w = first + tl.arange(0, BLOCK_W)
                    row = (n * tokens + place) * width + w
                    z = tl.load(z_ptr + row, mask=(number >= 0) & (w < width), other=0.0)
                    if start_ptr is not None:
                        old = start_ptr + state + (-1 - number) * width + w
                        z += tl.load(old, mask=(number < 0) & (w < width), other=0.0)
                    tl.store(state_ptr + state + k * width + w, z, mask=w < width)


def remember_gated(
    source: torch.Tensor,
    ids: torch.Tensor | None,
    real: torch.Tensor,
    gates: Sequence[tuple[torch.Tensor, torch.Tensor]],
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u_t = [z_t, h_t of each layer] of every token, by the recurrence of this module.

    Args:
        source: float32: [V, W], z of each token id; without ids [N * T, W], z of each token.
        ids: [N, T] int, all below V: they are not looked at on the host; or None.
        real: [N, T] bool, False at padding, T from 1; of any strides.
        gates: of each layer V, [2 U, R W] and above the first [2 U, R W + U of the one below], and b, [2 U]; float32.
        start: [N, (R - 1) W + all U] float32, the state before the first token; None: zeros.

    Returns:
        z [N, T, W], u [N, T, W + all U], and [N, (R - 1) W + all U], the state after the last token; float32, without
        gradients.
    """
    (N, T), W = real.shape, source.shape[1]
    source = source.contiguous()
    start = None if start is None else start.contiguous()
    chunks, reach = triton.cdiv(T, CHUNK), gates[0][0].shape[1] // W
    every = sum(len(b) // 2 for _, b in gates)
    z = source.view(N, T, W) if ids is None else source.new_empty(N, T, W)
    u, state = source.new_empty(N, T, W + every), source.new_empty(N, (reach - 1) * W + every)
    places = count = None
    if real.stride(1):  # else a sequence is real or padding as a whole, and the tokens are in their order
        places, count = torch.empty(2, N, T, dtype=torch.int32, device=real.device)
        _places_kernel[(N,)](real, places, count, T, *real.stride(), BLOCK_T=1024, num_warps=4)
    table = None if ids is None else source
    ids = None if ids is None else ids.contiguous()
    below, column = 0, W
    for v, b in gates:
        U = len(b) // 2
        keep = source.new_empty(N, T, U)
        kept, ends = source.new_empty(N, chunks, U), source.new_empty(N, chunks, U)
        block = max(16, min(32, triton.next_power_of_2(U)))
        grid = (N, chunks, triton.cdiv(U, block))
        sizes = (T, W, U, below, column, u.shape[2], state.shape[1], chunks, *real.stride())
        shape = {"REACH": reach, "CHUNK": CHUNK, "BLOCK_U": block, "num_warps": 4}
        _chunks_kernel[grid](
            table, ids, z, real, places, count, start, v.contiguous(), b.contiguous(), u, keep, kept, ends, *sizes,
            BLOCK_W=max(16, min(64, triton.next_power_of_2(W))), PRECISION=precision(u.device), **shape,
        )  # fmt: skip
        _carry_kernel[grid](
            z, real, places, count, start, keep, kept, ends, u, state, *sizes,
            BLOCK_C=64, BLOCK_W=triton.next_power_of_2(W), **shape,
        )  # fmt: skip
        table = ids = None  # the first layer has copied z
        below, column = U, column + U
    return z, u, state


@triton.jit
def _see_kernel(
    ids_ptr, real_ptr, table_ptr, state_ptr, seen_ptr, u_ptr, width, stride_u, stride_state,
    REACH: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Puts a token's z before those that the state remembers, for the gates to read, and into the state if real."""
    n = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    z = tl.load(table_ptr + tl.load(ids_ptr + n).to(tl.int64) * width + w, mask=w < width, other=0.0)
    real = tl.load(real_ptr + n) != 0
    tl.store(u_ptr + n * stride_u + w, z, mask=w < width)
    for k in tl.static_range(REACH):
        tl.store(seen_ptr + (n * REACH + k) * width + w, z, mask=w < width)
        if k < REACH - 1:
            cell = state_ptr + n * stride_state + k * width + w
            older = tl.load(cell, mask=w < width, other=0.0)
            tl.store(cell, z, mask=real & (w < width))
            z = older


@triton.jit(do_not_specialize=COUNTS)
def _open_kernel(
    seen_ptr, real_ptr, gates_ptr, bias_ptr, state_ptr, u_ptr,
    tokens, seen, units, below, column, own, stride_u, stride_state,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A layer's gates and candidates for one token of each sequence, and its h: in the state at ``own``, into u at
    ``column``. For one sequence or for a block of them; a few units of V are read before the rest is there."""
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    mine = unit < units
    d = tl.arange(0, BLOCK_D)
    inputs = seen + below
    gate_bias = tl.load(bias_ptr + unit, mask=mine, other=0.0)
    candidate_bias = tl.load(bias_ptr + units + unit, mask=mine, other=0.0)
    if BLOCK_T == 1:
        takes = mine[:, None] & (d < seen)[None, :]
        at = gates_ptr + unit[:, None] * inputs + d[None, :]
        v = tl.load(at, mask=takes, other=0.0)
        c = tl.load(at + units * inputs, mask=takes, other=0.0)
        e = tl.arange(0, BLOCK_B)
        takes = mine[:, None] & (e < below)[None, :]
        at = gates_ptr + unit[:, None] * inputs + (seen + e)[None, :]
        lower_v = tl.load(at, mask=takes, other=0.0)
        lower_c = tl.load(at + units * inputs, mask=takes, other=0.0)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        n = tl.program_id(1).to(tl.int64)
        x = tl.load(seen_ptr + n * seen + d, mask=d < seen, other=0.0)
        h = tl.load(u_ptr + n * stride_u + column - below + e, mask=e < below, other=0.0)
        gate = tl.sum(v * x[None, :], 1) + tl.sum(lower_v * h[None, :], 1) + gate_bias
        candidate = tl.sum(c * x[None, :], 1) + tl.sum(lower_c * h[None, :], 1) + candidate_bias
        cell = state_ptr + n * stride_state + own + unit
        old = tl.load(cell, mask=mine, other=0.0)
        real = tl.load(real_ptr + n) != 0
        new = tl.where(real, old + (candidate - old) / (1.0 + tl.exp(-gate)), old)
        tl.store(cell, new, mask=mine)
        tl.store(u_ptr + n * stride_u + column + unit, new, mask=mine)
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        t = (tl.program_id(1) * BLOCK_T).to(tl.int64) + tl.arange(0, BLOCK_T)
        there = t < tokens
        gates = tl.zeros((BLOCK_T, BLOCK_U), tl.float32)
        candidates = tl.zeros((BLOCK_T, BLOCK_U), tl.float32)
        for first in range(0, inputs, BLOCK_D):
            i = first + d
            lower = i - seen  # in what the layer below holds
            x = tl.load(seen_ptr + t[:, None] * seen + i[None, :], mask=there[:, None] & (i < seen)[None, :], other=0.0)
            x += tl.load(
                u_ptr + t[:, None] * stride_u + (column - below + lower)[None, :],
                mask=there[:, None] & ((lower >= 0) & (lower < below))[None, :], other=0.0,
            )  # fmt: skip
            at = gates_ptr + unit[None, :] * inputs + i[:, None]
            takes = mine[None, :] & (i < inputs)[:, None]
            gates = tl.dot(x, tl.load(at, mask=takes, other=0.0), gates, input_precision=PRECISION)
            c = tl.load(at + units * inputs, mask=takes, other=0.0)
            candidates = tl.dot(x, c, candidates, input_precision=PRECISION)
        gates += gate_bias[None, :]
        candidates += candidate_bias[None, :]
        here = there[:, None] & mine[None, :]
        cells = state_ptr + t[:, None] * stride_state + own + unit[None, :]
        olds = tl.load(cells, mask=here, other=0.0)
        reals = tl.load(real_ptr + t, mask=there, other=0) != 0
        news = tl.where(reals[:, None], olds + (candidates - olds) / (1.0 + tl.exp(-gates)), olds)
        tl.store(cells, news, mask=here)
        tl.store(u_ptr + t[:, None] * stride_u + column + unit[None, :], news, mask=here)


def step_gated(
    ids: torch.Tensor,
    real: torch.Tensor,
    table: torch.Tensor,
    gates: Sequence[tuple[torch.Tensor, torch.Tensor]],
    state: torch.Tensor,
    seen: torch.Tensor,
    u: torch.Tensor,
    launch: dict[str, bool],
) -> None:
    """One token of each of N sequences: writes ``state`` in place, ``u``, and the scratch ``seen`` [N, R W]. Others as
    for :func:`remember_gated`, ``launch`` as for :func:`molora_kernels.affine.affine`."""
    N, W = len(ids), table.shape[1]
    reach = seen.shape[1] // W
    strides = u.shape[1], state.shape[1]
    block_w = triton.next_power_of_2(W)
    _see_kernel[(N,)](
        ids, real, table, state, seen, u, W, *strides, REACH=reach, BLOCK_W=block_w, num_warps=1, **launch
    )
    below, column = 0, W
    for v, b in gates:
        U = len(b) // 2
        block_t, block_u, block_d = (1, FEW_UNITS, triton.next_power_of_2(seen.shape[1])) if N < FEW else (16, 16, 64)
        _open_kernel[(triton.cdiv(U, block_u), triton.cdiv(N, block_t))](
            seen, real, v, b, state, u, N, seen.shape[1], U, below, column, (reach - 2) * W + column, *strides,
            BLOCK_U=block_u, BLOCK_D=block_d, BLOCK_B=triton.next_power_of_2(max(1, below)), BLOCK_T=block_t,
            PRECISION=precision(u.device), num_warps=4, **launch,
        )  # fmt: skip
        below, column = U, column + U
