"""A router's memory over a whole prompt in Triton: exponential moving averages at every token, in two launches.

Chunks of tokens are summed up side by side; then each chunk adds up what those before it leave, which decays by the
real tokens since, and does its own tokens as one product with the matrix of decays d^(real tokens between).
"""

import torch
import triton
import triton.language as tl

from molora_kernels.affine import precision
from molora_kernels.limits import COUNTS

CHUNK = 32  # tokens


@triton.jit
def _is_real(n, t, real_ptr, tokens, real_n, real_t):
    """[CHUNK] float32, 1 at a token that is no padding."""
    return (tl.load(real_ptr + n * real_n + t * real_t, mask=t < tokens, other=0) != 0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def _ends_kernel(
    table_ptr, ids_ptr, z_ptr, real_ptr, decays_ptr, ends_ptr, totals_ptr,
    tokens, width, chunks, real_n, real_t,
    DECAYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What a chunk alone leaves, and how many real tokens it has. With token ids, z is copied from the table."""
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    token = n * tokens + t
    here = (t < tokens)[:, None] & (w < width)[None, :]
    at = token[:, None] * width + w[None, :]
    if ids_ptr is None:
        z = tl.load(z_ptr + at, mask=here, other=0.0)
    else:
        row = tl.load(ids_ptr + token, mask=t < tokens, other=0).to(tl.int64)
        z = tl.load(table_ptr + row[:, None] * width + w[None, :], mask=here, other=0.0)
        tl.store(z_ptr + at, z, mask=here)
    real = _is_real(n, t, real_ptr, tokens, real_n, real_t)
    total = tl.sum(real, 0)
    after = total - tl.cumsum(real, 0)
    for d in tl.static_range(DECAYS):
        decay = tl.load(decays_ptr + d)
        weight = real * (1.0 - decay) * tl.exp(tl.log(decay) * after)
        end = tl.sum(z * weight[:, None], 0)
        tl.store(ends_ptr + ((n * chunks + chunk) * DECAYS + d) * width + w, end, mask=w < width)
    if tl.program_id(2) == 0:
        tl.store(totals_ptr + n * chunks + chunk, total)


@triton.jit(do_not_specialize=COUNTS)
def _averages_kernel(
    z_ptr, real_ptr, decays_ptr, start_ptr, ends_ptr, totals_ptr, u_ptr, state_ptr,
    tokens, width, chunks, real_n, real_t,
    DECAYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = tl.arange(0, CHUNK)
    t = chunk * CHUNK + i
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = w < width
    token = n * tokens + t
    here = (t < tokens)[:, None] & inside[None, :]
    z = tl.load(z_ptr + token[:, None] * width + w[None, :], mask=here, other=0.0)
    u = u_ptr + token[:, None] * ((1 + DECAYS) * width) + w[None, :]
    tl.store(u, z, mask=here)
    real = _is_real(n, t, real_ptr, tokens, real_n, real_t)
    count = tl.cumsum(real, 0)
    # A row's own count less a column's; the columns' are the same numbers, laid out the other way.
    between = count[:, None] - tl.sum(tl.where(i[:, None] == i[None, :], count[:, None], 0.0), 0)[None, :]
    visible = tl.sum(tl.where(i[:, None] == i[None, :], real[:, None], 0.0), 0)[None, :]
    visible = tl.where(i[:, None] >= i[None, :], visible, 0.0)
    last = (i == CHUNK - 1) & (chunk == chunks - 1)  # rows past the last token hold what it left
    for d in tl.static_range(DECAYS):
        decay = tl.load(decays_ptr + d)
        log = tl.log(decay)
        state = (n * DECAYS + d) * width + w
        carried = tl.zeros((BLOCK_W,), tl.float32)
        if start_ptr is not None:
            carried = tl.load(start_ptr + state, mask=inside, other=0.0)
        for first in range(0, chunk, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            counts = tl.load(totals_ptr + n * chunks + c, mask=c < chunk, other=0.0)
            total = tl.sum(counts, 0)
            left = tl.exp(log * (total - tl.cumsum(counts, 0)))
            ends = tl.load(
                ends_ptr + ((n * chunks + c) * DECAYS + d)[:, None] * width + w[None, :],
                mask=(c < chunk)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            carried = carried * tl.exp(log * total) + tl.sum(ends * left[:, None], 0)
        weight = visible * (1.0 - decay) * tl.exp(log * tl.maximum(between, 0.0))
        m = tl.dot(weight, z, input_precision=PRECISION) + tl.exp(log * count)[:, None] * carried[None, :]
        tl.store(u + (1 + d) * width, m, mask=here)
        tl.store(state_ptr + state[None, :] + i[:, None] * 0, m, mask=last[:, None] & inside[None, :])


def remember(
    source: torch.Tensor,
    ids: torch.Tensor | None,
    real: torch.Tensor,
    decays: torch.Tensor,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u_t = [z_t, m_t of each decay], m_t = d m_{t-1} + (1 - d) z_t at each real token, m_t = m_{t-1} at padding.

    Args:
        source: float32: [V, W], z of each token id; without ids [N * T, W], z of each token.
        ids: [N, T] int, all below V: they are not looked at on the host; or None.
        real: [N, T] bool, False at padding, T from 1; of any strides.
        decays: [D] float32 in (0, 1).
        start: [N, D, W] float32, m before the first token; None: zeros.

    Returns:
        z [N, T, W], u [N, T, (1 + D) W], and [N, D, W], m after the last token; float32, without gradients.
    """
    (N, T), W = real.shape, source.shape[1]
    source, decays = source.contiguous(), decays.contiguous()
    start = None if start is None else start.contiguous()
    D, chunks = len(decays), triton.cdiv(T, CHUNK)
    z = source.view(N, T, W) if ids is None else source.new_empty(N, T, W)
    u, state = source.new_empty(N, T, (1 + D) * W), source.new_empty(N, D, W)
    ends, totals = source.new_empty(N, chunks, D, W), source.new_empty(N, chunks)
    block = max(16, min(32, triton.next_power_of_2(W)))
    grid, sizes = (N, chunks, triton.cdiv(W, block)), (T, W, chunks, *real.stride())
    shape = {"DECAYS": D, "CHUNK": CHUNK, "BLOCK_W": block, "num_warps": 4}
    table = None if ids is None else source
    _ends_kernel[grid](
        table, None if ids is None else ids.contiguous(), z, real, decays, ends, totals, *sizes, **shape
    )  # fmt: skip
    _averages_kernel[grid](
        z, real, decays, start, ends, totals, u, state, *sizes, BLOCK_C=64, PRECISION=precision(u.device), **shape
    )  # fmt: skip
    return z, u, state


def moving_averages(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The averages alone, [N, T, D, W] at each token and [N, D, W] after the last, of z [N, T, W]; otherwise as
    :func:`remember`."""
    _, u, state = remember(z.flatten(0, 1), None, real, decays, start)
    return u.unflatten(2, (-1, z.shape[2]))[:, :, 1:], state
