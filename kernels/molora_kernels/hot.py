"""The hot set in training: of few adapters all ranks go through dense products, gated in between by one kernel.

A training step over few adapters is bound by the host's calls, not by the GPU: three calls a module and direction are
fewer than the forms by slot need, and the ranks of a few adapters widen the base's own products by little.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from molora_kernels.pages import PAGE, PageView


def add_lora_hot(
    y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, pages: PageView, slots: torch.Tensor
) -> torch.Tensor:
    """As :func:`molora_kernels.paged.add_lora_paged`, with gradients. All of ``pages.A`` and ``pages.B`` is multiplied,
    that of no slot by zeros: it has to be finite."""
    return _AddHot.apply(y, x, weights, pages.A, pages.B, pages, slots)


@triton.jit
def _gate_kernel(
    given_ptr, out_ptr, h_ptr, dweights_ptr, slots_ptr, weights_ptr, first_ptr, count_ptr, tokens, ranks,
    TOP: tl.constexpr, PAGE: tl.constexpr, OUT: tl.constexpr, WEIGHTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """OUT: out [T, ranks] = given, each rank by the weight at which the token takes its slot. WEIGHTS: the gradient of
    the weights, which is the sum over a slot's ranks of h * given; ADD: added to what is there."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = t < tokens
    row = t.to(tl.int64)
    if OUT:
        for start in range(0, ranks, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            gate = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for k in tl.static_range(TOP):
                slot = tl.load(slots_ptr + row * TOP + k, mask=here, other=-1)
                weight = tl.load(weights_ptr + row * TOP + k, mask=here, other=0.0)
                gate += tl.where(_owned(slot, r, first_ptr, count_ptr, PAGE), weight[:, None], 0.0)
            at = row[:, None] * ranks + r[None, :]
            mask = here[:, None] & (r < ranks)[None, :]
            given = tl.load(given_ptr + at, mask=mask & (gate != 0.0), other=0.0).to(tl.float32)
            tl.store(out_ptr + at, (given * gate).to(out_ptr.dtype.element_ty), mask=mask)
    if WEIGHTS:
        for k in tl.static_range(TOP):
            slot = tl.load(slots_ptr + row * TOP + k, mask=here, other=-1)
            own = tl.zeros((BLOCK_T,), tl.float32)
            for start in range(0, ranks, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                at = row[:, None] * ranks + r[None, :]
                mask = _owned(slot, r, first_ptr, count_ptr, PAGE) & here[:, None] & (r < ranks)[None, :]
                h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
                own += tl.sum(h * tl.load(given_ptr + at, mask=mask, other=0.0).to(tl.float32), 1)
            if ADD:
                own += tl.load(dweights_ptr + row * TOP + k, mask=here, other=0.0)
            tl.store(dweights_ptr + row * TOP + k, own, mask=here)


@triton.jit
def _owned(slot, r, first_ptr, count_ptr, PAGE: tl.constexpr):
    """[tokens, ranks] which ranks are of each token's slot."""
    first = tl.load(first_ptr + slot, mask=slot >= 0, other=0)[:, None] * PAGE
    count = tl.load(count_ptr + slot, mask=slot >= 0, other=0)[:, None] * PAGE
    return (r[None, :] >= first) & (r[None, :] < first + count)


def _gated(
    given: torch.Tensor,
    pages: PageView,
    index: int,
    slots: torch.Tensor,
    weights: torch.Tensor,
    h: torch.Tensor | None = None,
    dweights: torch.Tensor | None = None,
    add: bool = False,
    out: bool = True,
) -> torch.Tensor:
    """``given`` [T, ranks of all pages] gated; and with ``h``, the gradient of the weights to ``dweights``."""
    T, ranks = given.shape
    gated = torch.empty_like(given) if out else given
    block_r = min(128, triton.next_power_of_2(ranks))
    _gate_kernel[(triton.cdiv(T, 16),)](
        given, gated, given if h is None else h, weights if dweights is None else dweights, slots, weights,
        pages.first[index], pages.count[index], T, ranks,
        TOP=slots.shape[1], PAGE=PAGE, OUT=out, WEIGHTS=dweights is not None, ADD=add, BLOCK_T=16, BLOCK_R=block_r,
        num_warps=4,
    )  # fmt: skip
    return gated


class _AddHot(torch.autograd.Function):
    """Keeps x only for dA, and the shrink of all ranks only for dB and d(weights)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        pages: PageView,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        _, _, for_weights, for_A, for_B = ctx.needs_input_grad[:5]
        shrunk = []
        with torch.autocast(x.device.type, enabled=False):
            for index, part in enumerate(y.view(-1, y.shape[-1]).split(pages.outputs, dim=1)):
                h = x @ pages.A[index].flatten(0, 1).T
                gated, factor = _gated(h, pages, index, slots, weights), pages.b_slice(index).flatten(0, 1)
                if part.dtype == x.dtype:
                    part.addmm_(gated, factor)
                else:
                    part.add_(gated @ factor)
                shrunk.append(h if for_weights or for_B else None)
        ctx.mark_dirty(y)
        ctx.save_for_backward(weights, slots, x if for_A else None, *shrunk)
        ctx.pages, ctx.x_dtype = pages, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return _AddHot._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, slots, x, *shrunk = ctx.saved_tensors
        pages: PageView = ctx.pages
        _, for_x, for_weights, for_A, for_B = ctx.needs_input_grad[:5]
        dx: torch.Tensor | None = None
        dweights = torch.empty_like(weights) if for_weights else None
        dA = torch.empty_like(pages.A) if for_A else None
        dB = torch.empty_like(pages.B) if for_B else None
        for index, part in enumerate(dy.to(ctx.x_dtype).reshape(len(slots), -1).split(pages.outputs, dim=1)):
            A, B, h = pages.A[index].flatten(0, 1), pages.b_slice(index).flatten(0, 1), shrunk[index]
            if dB is not None:
                gated = _gated(h, pages, index, slots, weights)
                torch.mm(gated.T, part, out=pages.b_slice(index, dB).flatten(0, 1))
            if not (for_x or for_weights or for_A):
                continue
            dh = part @ B.T
            dh = _gated(dh, pages, index, slots, weights, h, dweights, add=index > 0, out=for_x or for_A)
            if dA is not None:
                torch.mm(dh.T, x, out=dA[index].flatten(0, 1))
            if for_x:
                dx = dh @ A if dx is None else dx.addmm_(dh, A)
        return dy, dx, dweights, dA, dB, None, None
