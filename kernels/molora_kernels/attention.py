"""Attention of one new token for each sequence over a static cache, in Triton: heads that share keys in one program,
the past in parts, and a second kernel that puts the parts together."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _part_kernel(
    q_ptr, keys_ptr, values_ptr, mask_ptr, length_ptr, out_ptr, parts_ptr, best_ptr, total_ptr,
    heads, kv_heads, longest, scale,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    part = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g = tl.arange(0, BLOCK_G)
    w = tl.arange(0, BLOCK_W)
    head = kv * GROUP + g
    q = tl.load(
        q_ptr + (n * heads + head)[:, None] * WIDTH + w[None, :], mask=(g < GROUP)[:, None] & (w < WIDTH)[None, :],
        other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    start_of = (n * kv_heads + kv) * longest
    end = tl.load(length_ptr + n).to(tl.int32) + 1
    best = tl.full((BLOCK_G,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_W), tl.float32)
    for start in range(part * BLOCK_T, end, PARTS * BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        seen = (tl.load(mask_ptr + n * longest + t, mask=t < end, other=0) != 0) & (t < end)
        cells = (start_of + t)[:, None] * WIDTH + w[None, :]
        here = seen[:, None] & (w < WIDTH)[None, :]
        k = tl.load(keys_ptr + cells, mask=here, other=0.0)
        v = tl.load(values_ptr + cells, mask=here, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -1.0e30)
        new = tl.maximum(best, tl.max(score, 1))
        p = tl.where(seen[None, :], tl.exp(score - new[:, None]), 0.0)
        shrunk = tl.exp(best - new)
        total = total * shrunk + tl.sum(p, 1)
        acc = acc * shrunk[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new
    at = (n * heads + head) * PARTS + part
    here = (g < GROUP)[:, None] & (w < WIDTH)[None, :]
    if PARTS == 1:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at[:, None] * WIDTH + w[None, :], out.to(out_ptr.dtype.element_ty), mask=here)
    else:
        tl.store(best_ptr + at, best, mask=g < GROUP)
        tl.store(total_ptr + at, total, mask=g < GROUP)
        tl.store(parts_ptr + at[:, None] * WIDTH + w[None, :], acc, mask=here)


@triton.jit
def _join_kernel(
    parts_ptr, best_ptr, total_ptr, out_ptr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    w = tl.arange(0, BLOCK_W)
    p = tl.arange(0, PARTS)
    best = tl.load(best_ptr + row * PARTS + p)
    share = tl.exp(best - tl.max(best, 0))
    total = tl.sum(tl.load(total_ptr + row * PARTS + p) * share, 0)
    parts = tl.load(parts_ptr + (row * PARTS + p)[:, None] * WIDTH + w[None, :], mask=(w < WIDTH)[None, :], other=0.0)
    out = tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * WIDTH + w, out.to(out_ptr.dtype.element_ty), mask=w < WIDTH)


@dataclass(frozen=True)
class AttentionTile:
    """How attention is cut: positions at a time, parts of the past (a power of two), warps, pipeline stages."""

    block: int = 64
    parts: int = 8
    warps: int = 4
    stages: int = 2


class Attention:
    """Attention of N sequences with memory for its parts.

    Args:
        batch: N. heads: H. width: d of a head.
        tile: how it is cut.
        device: of the queries.
    """

    def __init__(self, batch: int, heads: int, width: int, tile: AttentionTile, device: torch.device) -> None:
        self.tile = tile
        self.scratch = torch.empty(batch, heads, tile.parts, width, dtype=torch.float32, device=device)
        self.best = torch.empty(batch, heads, tile.parts, dtype=torch.float32, device=device)
        self.total = torch.empty(batch, heads, tile.parts, dtype=torch.float32, device=device)

    def __call__(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        length: torch.Tensor,
        scale: float,
        pdl: bool = False,
    ) -> None:
        """Softmax(scale q K^T) V over the positions 0 to ``length`` (included) that ``mask`` lets through; zeros for a
        sequence of length -1.

        Args:
            out: [N, H, d], written.
            q: [N, H, d].
            keys, values: [N, G, longest, d], contiguous.
            mask: [N, longest] bool; at least one position of each sequence must be seen.
            length: [N] int64, on the device.
            scale: of the scores.
            pdl: as for :func:`molora_kernels.linear.linear`.

        Raises:
            ValueError: a length of another number of sequences.
        """
        N, H, d = q.shape
        if len(length) != N:
            raise ValueError(f"{len(length)} lengths for {N} sequences.")
        G, longest = keys.shape[1], keys.shape[2]
        launch = {"launch_pdl": True} if pdl else {}
        block_w, tile = triton.next_power_of_2(d), self.tile
        _part_kernel[(N, G, tile.parts)](
            q, keys, values, mask, length, out, self.scratch, self.best, self.total, H, G, longest, scale,
            GROUP=H // G, BLOCK_G=max(16, triton.next_power_of_2(H // G)), WIDTH=d, BLOCK_W=max(16, block_w),
            BLOCK_T=tile.block, PARTS=tile.parts, UPCAST=q.device.type == "cpu", PDL=pdl, num_warps=tile.warps,
            num_stages=tile.stages, **launch,
        )  # fmt: skip
        if tile.parts > 1:
            _join_kernel[(N * H,)](
                self.scratch, self.best, self.total, out, WIDTH=d, BLOCK_W=block_w, PARTS=tile.parts, PDL=pdl,
                num_warps=1, **launch,
            )  # fmt: skip
