"""The hot set in training: of few adapters all ranks go through dense products, masked in between.

Dense products are few calls for the host, and the ranks of a few adapters widen the base's own by little. That this is
faster than the kernels by slot is expected from the number of calls, and not measured yet.
"""

from typing import Any

import torch

from molora_kernels.pages import PAGE, PageView


def add_lora_hot(
    y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, pages: PageView, slots: torch.Tensor
) -> torch.Tensor:
    """As :func:`molora_kernels.paged.add_lora_paged`, with gradients. All of ``pages.A`` and ``pages.B`` is multiplied,
    that of no slot by zeros: it has to be finite."""
    return _AddHot.apply(y, x, weights, pages.A, pages.B, pages, slots)


def _gate(pages: PageView, index: int, slots: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one slice: at which weight each token takes each rank, [T, pages x PAGE] float32, and which slot's rank it is,
    [slots, pages x PAGE] float32 of ones and zeros."""
    page = torch.arange(pages.pages, device=slots.device, dtype=torch.int32)
    first = pages.first[index].unsqueeze(1)
    owner = ((page >= first) & (page < first + pages.count[index].unsqueeze(1))).float().repeat_interleave(PAGE, 1)
    each = torch.arange(pages.slots, device=slots.device)
    taken = ((slots.unsqueeze(2) == each) * weights.unsqueeze(2)).sum(1)
    return taken @ owner, owner


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
            for index, width in enumerate(pages.outputs):
                start = sum(pages.outputs[:index])
                gate, _ = _gate(pages, index, slots, weights)
                h = x @ pages.A[index].flatten(0, 1).T
                part, ranks = y[:, start : start + width], (h * gate).to(x.dtype)
                if part.dtype == x.dtype:
                    part.addmm_(ranks, pages.b_slice(index).flatten(0, 1))
                else:
                    part.add_(ranks @ pages.b_slice(index).flatten(0, 1))
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
        dtaken: torch.Tensor | None = None
        dA = torch.empty_like(pages.A) if for_A else None
        dB = torch.empty_like(pages.B) if for_B else None
        for index, part in enumerate(dy.to(ctx.x_dtype).split(pages.outputs, dim=1)):
            gate, owner = _gate(pages, index, slots, weights)
            A, B, h = pages.A[index].flatten(0, 1), pages.b_slice(index).flatten(0, 1), shrunk[index]
            if dB is not None:
                torch.mm((h * gate).to(part.dtype).T, part, out=pages.b_slice(index, dB).flatten(0, 1))
            if not (for_x or for_weights or for_A):
                continue
            dh = part @ B.T
            if for_weights:
                own = (h.float() * dh) @ owner.T
                dtaken = own if dtaken is None else dtaken + own
            dh = (dh * gate).to(part.dtype)
            if dA is not None:
                torch.mm(dh.T, x, out=dA[index].flatten(0, 1))
            if for_x:
                dx = dh @ A if dx is None else dx.addmm_(dh, A)
        dweights = None
        if dtaken is not None:
            dweights = dtaken.gather(1, slots.clamp(min=0).long()) * (slots >= 0)
        return dy, dx, dweights, dA, dB, None, None
