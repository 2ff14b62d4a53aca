"""y = W x + b in float32 for the few small matrices of a router, for one token or for many."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from molora_kernels.limits import COUNTS

FEW = 16  # tokens below which each goes through by itself
PROGRAMS = 128  # that a product is cut into at least, where it can be: about as many as a GPU runs side by side


@triton.jit(do_not_specialize=COUNTS)
def _affine_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, tokens, width_in, width_out,
    SILU: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = W x + b in float32: a few rows of W, read before x is there, for one token or for a block of them."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.arange(0, BLOCK_D)
    b = tl.load(b_ptr + o, mask=o < width_out, other=0.0)
    if BLOCK_T == 1:
        w = tl.load(
            w_ptr + o[:, None] * width_in + d[None, :],
            mask=(o < width_out)[:, None] & (d < width_in)[None, :], other=0.0,
        )  # fmt: skip
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        t = tl.program_id(1)
        x = tl.load(x_ptr + t * width_in + d, mask=d < width_in, other=0.0)
        y = tl.sum(w * x[None, :], 1) + b
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + t * width_out + o, y, mask=o < width_out)
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        t = (tl.program_id(1) * BLOCK_T).to(tl.int64) + tl.arange(0, BLOCK_T)
        acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for start in range(0, width_in, BLOCK_D):
            at = start + d
            x = tl.load(
                x_ptr + t[:, None] * width_in + at[None, :],
                mask=(t < tokens)[:, None] & (at < width_in)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                w_ptr + o[None, :] * width_in + at[:, None],
                mask=(o < width_out)[None, :] & (at < width_in)[:, None], other=0.0,
            )  # fmt: skip
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        many = acc + b[None, :]
        if SILU:
            many = many / (1.0 + tl.exp(-many))
        tl.store(
            y_ptr + t[:, None] * width_out + o[None, :], many, mask=(t < tokens)[:, None] & (o < width_out)[None, :]
        )


def affine(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, y: torch.Tensor, silu: bool, launch: dict[str, bool]
) -> None:
    """y = W x + b, with SiLU if ``silu``. x: [T, D], y: [..., O] for as many tokens; float32. ``launch``: whether the
    launch may begin before the one ahead of it is done (PDL)."""
    block_t, block_o, block_d = blocks(len(x), *w.shape)
    _affine_kernel[(triton.cdiv(len(w), block_o), triton.cdiv(len(x), block_t))](
        x, w, b, y, len(x), w.shape[1], w.shape[0],
        SILU=silu, BLOCK_O=block_o, BLOCK_D=block_d, BLOCK_T=block_t, PRECISION=precision(x.device), num_warps=4,
        **launch,
    )  # fmt: skip


def blocks(tokens: int, width_out: int, width_in: int) -> tuple[int, int, int]:
    """How many tokens, outputs and inputs a program takes at once: so few that there are programs enough."""
    if tokens < FEW:
        return 1, 16, triton.next_power_of_2(width_in)
    block_t, block_o = 64, max(16, min(64, triton.next_power_of_2(width_out)))
    while block_t > 16 and triton.cdiv(tokens, block_t) * triton.cdiv(width_out, block_o) < PROGRAMS:
        block_t //= 2
    while block_o > 16 and triton.cdiv(tokens, block_t) * triton.cdiv(width_out, block_o) < PROGRAMS:
        block_o //= 2
    return block_t, block_o, 32 if block_t * block_o >= 1024 else 64  # registers are few


def precision(device: torch.device) -> str:
    """How float32 is multiplied: on NVIDIA's tensor cores as three products of TF32, which is about as exact."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"
