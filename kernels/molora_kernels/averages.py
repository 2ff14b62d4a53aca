"""A router's memory over a whole prompt in Triton: exponential moving averages at every token, in two launches.

Chunks of tokens are summed up side by side; then each chunk takes over what the ones before it leave, and does its own
tokens as one product with the matrix of decays d^(real tokens between).
"""

import torch
import triton
import triton.language as tl

CHUNK = 64  # tokens


@triton.jit
def _ends_kernel(
    z_ptr, real_ptr, decays_ptr, ends_ptr, counts_ptr, tokens, width, chunks,
    DECAYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    real = (tl.load(real_ptr + n * tokens + t, mask=t < tokens, other=0) != 0).to(tl.float32)
    total = tl.sum(real, 0)
    after = total - tl.cumsum(real, 0)
    here = (t < tokens)[:, None] & (w < width)[None, :]
    z = tl.load(z_ptr + (n * tokens + t)[:, None] * width + w[None, :], mask=here, other=0.0)
    for d in tl.static_range(DECAYS):
        decay = tl.load(decays_ptr + d)
        weight = real * (1.0 - decay) * tl.exp(tl.log(decay) * after)
        end = tl.sum(z * weight[:, None], 0)
        tl.store(ends_ptr + ((n * chunks + chunk) * DECAYS + d) * width + w, end, mask=w < width)
    if tl.program_id(2) == 0:
        tl.store(counts_ptr + n * chunks + chunk, total)


@triton.jit
def _averages_kernel(
    z_ptr, real_ptr, decays_ptr, start_ptr, ends_ptr, counts_ptr, out_ptr, state_ptr, tokens, width, chunks,
    DECAYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = tl.arange(0, CHUNK)
    t = chunk * CHUNK + i
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    real = (tl.load(real_ptr + n * tokens + t, mask=t < tokens, other=0) != 0).to(tl.float32)
    count = tl.cumsum(real, 0)
    here = (t < tokens)[:, None] & (w < width)[None, :]
    z = tl.load(z_ptr + (n * tokens + t)[:, None] * width + w[None, :], mask=here, other=0.0)
    # A row's own count less a column's; the columns' are the same numbers, laid out the other way.
    between = count[:, None] - tl.sum(tl.where(i[:, None] == i[None, :], count[:, None], 0.0), 0)[None, :]
    visible = tl.sum(tl.where(i[:, None] == i[None, :], real[:, None], 0.0), 0)[None, :]
    visible = tl.where(i[:, None] >= i[None, :], visible, 0.0)
    for d in tl.static_range(DECAYS):
        decay = tl.load(decays_ptr + d)
        log = tl.log(decay)
        carried = tl.load(start_ptr + (n * DECAYS + d) * width + w, mask=w < width, other=0.0)
        for before in range(chunk):
            end = tl.load(ends_ptr + ((n * chunks + before) * DECAYS + d) * width + w, mask=w < width, other=0.0)
            carried = carried * tl.exp(log * tl.load(counts_ptr + n * chunks + before)) + end
        weight = visible * (1.0 - decay) * tl.exp(log * tl.maximum(between, 0.0))
        m = tl.dot(weight, z, input_precision="ieee") + tl.exp(log * count)[:, None] * carried[None, :]
        tl.store(out_ptr + ((n * tokens + t)[:, None] * DECAYS + d) * width + w[None, :], m, mask=here)
        if chunk == chunks - 1:
            end = tl.load(ends_ptr + ((n * chunks + chunk) * DECAYS + d) * width + w, mask=w < width, other=0.0)
            state = carried * tl.exp(log * tl.sum(real, 0)) + end
            tl.store(state_ptr + (n * DECAYS + d) * width + w, state, mask=w < width)


def moving_averages(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m_t = d m_{t-1} + (1 - d) z_t at each real token, m_t = m_{t-1} at padding; without gradients.

    Args:
        z: [N, T, W] float32, T from 1.
        real: [N, T] bool, False at padding.
        decays: [D] float32 in (0, 1).
        start: [N, D, W] float32, m before the first token.

    Returns:
        [N, T, D, W], m at each token, and [N, D, W], m after the last.
    """
    N, T, W = z.shape
    D, chunks = len(decays), triton.cdiv(T, CHUNK)
    out, state = z.new_empty(N, T, D, W), z.new_empty(N, D, W)
    ends, counts = z.new_empty(N, chunks, D, W), z.new_empty(N, chunks)
    block = max(16, min(64, triton.next_power_of_2(W)))
    grid = (N, chunks, triton.cdiv(W, block))
    inputs = (z.contiguous(), real.contiguous(), decays.contiguous())
    shape = {"DECAYS": D, "CHUNK": CHUNK, "BLOCK_W": block, "num_warps": 4}
    _ends_kernel[grid](*inputs, ends, counts, T, W, chunks, **shape)
    _averages_kernel[grid](*inputs, start.contiguous(), ends, counts, out, state, T, W, chunks, **shape)
    return out, state
