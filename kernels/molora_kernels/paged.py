"""The grouped product over rank pages: checks, the order of tokens, and the choice of a form."""

from typing import Any

import torch

from molora_kernels import forms
from molora_kernels.blocks import Blocks, make_blocks
from molora_kernels.cores import apply_cores
from molora_kernels.expand import ExpandTile, expand
from molora_kernels.hot import add_lora_hot, hot_gates
from molora_kernels.order import PagedPlan, order_by_slot
from molora_kernels.outer import outer, pairs_by_slot
from molora_kernels.pages import PAGE, PageView
from molora_kernels.shrink import shrink, shrink_hot
from molora_kernels.tiles import expand_tile, hot, shrink_tile


def add_lora_paged(
    y: torch.Tensor,
    x: torch.Tensor,
    pages: PageView,
    slots: torch.Tensor,
    weights: torch.Tensor,
    blocks: Blocks | None = None,
    *,
    by_token: bool | None = None,
    hot_set: bool | None = None,
) -> torch.Tensor:
    """y[t] += sum over k of weights[t, k] * x[t] A_s^T B_s, for s = slots[t, k] >= 0; in place. Between A and B stands
    the slot's core, if it has one.

    Gradients go to y, x and weights, and to ``pages.A`` and ``pages.B`` where these require one (as arenas: all
    adapters that act are trained at once).

    Args:
        y: [..., sum of the slices' O], the base's output of T tokens, rows contiguous. With gradients, best as the base
            returns it: a change in place of a view would be copied on the way back.
        x: [T, D], its input, rows contiguous, in the factors' dtype.
        pages: the adapters, with gradients none that have cores. A slot that is empty, or adapts none of the slices,
            adds nothing.
        slots: [T, S] int32 or int64, contiguous, -1 for none, all below ``pages.slots``: they are not looked at on the
            host, so that nothing waits for the device.
        weights: [T, S] float32, contiguous.
        blocks: of :class:`molora_kernels.order.PagedPlan`, shared by the modules of a forward; made here where they are
            needed and missing.
        by_token: which form; None: by the number of tokens.
        hot_set: whether the ranks of all adapters are multiplied for every token, which few of them are worth; None: by
            the table, and with gradients (:mod:`molora_kernels.hot`) by their number.

    Returns:
        y.

    Raises:
        ValueError: a tensor of the wrong shape, dtype, stride or device; nothing has changed.
    """
    rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    _check(rows, x, pages, slots, weights)
    T, S = slots.shape
    if T == 0 or S == 0:
        return y
    if blocks is not None and (blocks.order is None or len(blocks.order) != T):
        of = "tokens as they come" if blocks.order is None else f"{len(blocks.order)} tokens"
        raise ValueError(f"blocks are of {of}, where {T} in the plan's order are wanted.")
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, weights, pages.A, pages.B))
    if trained and pages.cores is not None:
        raise ValueError("Cores have no gradients: add what they add by products of its parts.")
    if trained and (hot_set if hot_set is not None else by_token is None and trained_hot(pages)):
        for index, gate in enumerate(hot_gates(slots, weights, pages)):
            own = rows if rows.shape[1] == pages.outputs[index] else rows.narrow(1, *pages.span(index))
            add_lora_hot(own, x, gate, pages.A[index].flatten(0, 1), pages.b_slice(index).flatten(0, 1))
        return y
    if by_token is None:
        by_token = forms.by_token(T)
    if by_token:
        blocks = None
    elif blocks is None:
        if not trained and hot_set is None and len(parts := passes(PagedPlan(slots, weights), pages)) > 1:
            for part in parts:
                add_lora_paged(rows, x, pages, part.slots, part.weights, by_token=False)
            return y
        blocks = make_blocks(slots, order_by_slot(slots))
    if trained:
        return _AddLoRA.apply(y, x, weights, pages.A, pages.B, pages, slots, blocks)
    h, tile = _shrink(x, pages, slots, blocks, hot_set), _expand_tile(pages, slots)
    expand(rows, h, pages, slots, weights, blocks, _upcast(x), tile=tile)
    return y


def trained_hot(pages: PageView) -> bool:
    """Whether a training step multiplies the ranks of all adapters for every token."""
    return forms.hot_trained(pages.pages * PAGE)


def passes(plan: PagedPlan, pages: PageView) -> tuple[PagedPlan, ...]:
    """The parts of a plan that are added one after the other: all of it at once, or column by column."""
    tokens, top = plan.slots.shape
    return (plan,) if top == 1 or forms.by_token(tokens) or forms.together(pages.slots) else plan.columns


def shrink_paged(x: torch.Tensor, pages: PageView, plan: PagedPlan) -> torch.Tensor:
    """The shrink of all slices, for :func:`expand_paged`. x: [T, D]. plan: one of :func:`passes`."""
    return _shrink(x, pages, plan.slots, _blocks(plan))


def expand_paged(
    y: torch.Tensor, h: torch.Tensor, pages: PageView, plan: PagedPlan, piece: int | None = None
) -> torch.Tensor:
    """y [T, O of slice ``piece``, or of all], rows contiguous, plus the expand of h, in place."""
    tile = _expand_tile(pages, plan.slots)
    return expand(y, h, pages, plan.slots, plan.weights, _blocks(plan), _upcast(y), piece, tile)


def _blocks(plan: PagedPlan) -> Blocks | None:
    return None if forms.by_token(plan.slots.shape[0]) else plan.blocks


def _shrink(
    x: torch.Tensor, pages: PageView, slots: torch.Tensor, blocks: Blocks | None, hot_set: bool | None = None
) -> torch.Tensor:
    if hot_set is None:
        hot_set = hot(len(slots), len(pages.outputs) * pages.pages * PAGE)
    # Of slots that share a run, a hot set has one number where each core makes another one.
    if blocks is not None and hot_set and pages.cores is None:
        return shrink_hot(x, pages)
    h = shrink(x, pages, slots, blocks, shrink_tile(len(slots), pages.slots), _upcast(x))
    if blocks is not None and pages.cores is not None:  # token by token the expand does it
        apply_cores(h, pages, slots)
    return h


def _expand_tile(pages: PageView, slots: torch.Tensor) -> ExpandTile:
    return expand_tile(len(slots), pages.slots)


class _AddLoRA(torch.autograd.Function):
    """Keeps x only for dA, and h summed over its parts (rank numbers for each token) only for dB and d(weights)."""

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
        blocks: Blocks | None,
    ) -> torch.Tensor:
        h = shrink(x, pages, slots, blocks, shrink_tile(len(slots), pages.slots), _upcast(x), zeros=True)
        rows = y.view(-1, y.shape[-1])
        expand(rows, h, pages, slots, weights, blocks, _upcast(x), tile=_expand_tile(pages, slots))
        ctx.mark_dirty(y)
        _, _, for_weights, for_A, for_B = ctx.needs_input_grad[:5]
        kept = (x if for_A else None, h.sum(0) if for_weights or for_B else None)
        ctx.save_for_backward(weights, slots, *kept)
        ctx.pages, ctx.blocks, ctx.x_dtype = pages, blocks, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, slots, x, h = ctx.saved_tensors
        pages: PageView = ctx.pages
        blocks: Blocks | None = ctx.blocks
        _, for_x, for_weights, for_A, for_B = ctx.needs_input_grad[:5]
        dx = torch.zeros(len(slots), pages.inputs, dtype=torch.float32, device=dy.device) if for_x else None
        dweights = torch.zeros_like(weights) if for_weights else None
        dA = torch.zeros_like(pages.A) if for_A else None
        dB = torch.zeros_like(pages.B) if for_B else None
        by_slot = pairs_by_slot(slots, pages.slots) if for_A or for_B else None
        upcast, ranks = _upcast(dy), pages.max_pages * PAGE
        for index, part in enumerate(dy.to(pages.A.dtype).reshape(len(slots), -1).split(pages.outputs, 1)):
            if for_x or for_weights or for_A:
                back = pages.transposed(index)
                dh = shrink(part, back, slots, blocks, shrink_tile(len(slots), pages.slots), upcast, zeros=True)
                if dx is not None:
                    expand(dx, dh, back, slots, weights, blocks, upcast, tile=_expand_tile(pages, slots))
                dh = dh.sum(0).float()
                if dweights is not None:
                    dweights += (h[..., index * ranks : (index + 1) * ranks] * dh).sum(-1)
                if dA is not None and by_slot is not None:
                    outer(dA[index], dh, x, weights, by_slot, pages, index, upcast)
            if dB is not None and by_slot is not None:
                own = h[..., index * ranks : (index + 1) * ranks]
                outer(pages.b_slice(index, dB), own, part, weights, by_slot, pages, index, upcast)
        return dy, None if dx is None else dx.to(ctx.x_dtype), dweights, dA, dB, None, None, None


def _upcast(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _check(y: torch.Tensor, x: torch.Tensor, pages: PageView, slots: torch.Tensor, weights: torch.Tensor) -> None:
    T, width = slots.shape[0], sum(pages.outputs)
    wanted = {
        "x": (x, (T, pages.inputs), (pages.A.dtype,)),
        "y": (y, (T, width), (torch.float32, torch.bfloat16, torch.float16)),
        "slots": (slots, tuple(slots.shape), (torch.int32, torch.int64)),
        "weights": (weights, tuple(slots.shape), (torch.float32,)),
    }
    if slots.dim() != 2:
        raise ValueError(f"slots must be [T, S], not {list(slots.shape)}.")
    for name, (tensor, shape, dtypes) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}.")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}.")
        if tensor.device != pages.A.device:
            raise ValueError(f"{name} is on {tensor.device}, the adapters on {pages.A.device}.")
        if tensor.numel() and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows, not strides {tensor.stride()}.")
    for name, tensor in (("slots", slots), ("weights", weights)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous.")
