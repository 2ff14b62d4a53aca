"""The hot set in training: of few adapters all ranks go through dense products, gated in between.

A training step of a large model over few adapters is bound by the host, so these are few calls of PyTorch's own, those
of the base among them. The ranks of a few adapters widen the base's products by little. All factors are multiplied,
those of no slot by zeros: they have to be finite.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from molora_kernels.pages import PAGE, PageView


def hot_gates(slots: torch.Tensor, weights: torch.Tensor, pages: PageView) -> tuple[torch.Tensor, ...]:
    """Of each slice: at which weight each token takes each rank, [T, pages x PAGE] float32.

    The weights get their gradient through it. slots, weights: [T, S].
    """
    each = torch.arange(pages.slots, device=slots.device)
    taken = ((slots.unsqueeze(2) == each) * weights.unsqueeze(2)).sum(1)
    page = torch.arange(pages.pages, device=slots.device)
    first, count = pages.first.unsqueeze(2), pages.count.unsqueeze(2)
    owners = ((page >= first) & (page < first + count)).float().repeat_interleave(PAGE, 2)  # [slices, slots, ranks]
    return tuple(taken @ owner for owner in owners)


def add_lora_hot(
    y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """y plus what the adapters add to it, in place and with all gradients.

    Args:
        y: [T, O]. x: [T, D], in the factors' dtype.
        gate: [T, R], of :func:`hot_gates`.
        A: [R, D], B: [R, O], of all pages of a slice.
    """
    with torch.autocast(x.device.type, enabled=False):
        gated = ((x @ A.T) * gate).to(x.dtype)
        return y.addmm_(gated, B) if y.dtype == x.dtype else y.add_(gated @ B)


def linear_hot(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> torch.Tensor:
    """[..., O], the product of a frozen module and what frozen adapters add to it, with gradients to x and gate.

    Args:
        x: [..., D], T tokens. weight: [O, D]. bias: [O].
        gate, A, B: as for :func:`add_lora_hot`, all in the dtype of x.
    """
    return _LinearHot.apply(x, gate, weight, bias, A, B)


class _LinearHot(torch.autograd.Function):
    """Keeps the shrink of all ranks only for d(gate), and never x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = F.linear(flat, A)
        y = F.linear(flat, weight, bias).addmm_(h * gate, B)
        ctx.save_for_backward(gate, h if ctx.needs_input_grad[1] else None)
        ctx.frozen = weight, A, B
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gate, h), (weight, A, B) = ctx.saved_tensors, ctx.frozen
        flat = dy.reshape(-1, dy.shape[-1])
        dgated = F.linear(flat, B)
        dgate = dgated * h if h is not None else None
        if not ctx.needs_input_grad[0]:
            return None, dgate, None, None, None, None
        dx = torch.mm(flat, weight).addmm_(dgated.mul_(gate), A)
        return dx.view(*dy.shape[:-1], -1), dgate, None, None, None, None
