"""The hot set in training: of few adapters all ranks go through dense products, gated in between.

A training step of a large model over few adapters is bound by the host, so these are few calls, each of them one of
PyTorch's own, with its own way back. The ranks of a few adapters widen the base's products by little.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from molora_kernels.pages import PAGE, PageView


def hot_gates(slots: torch.Tensor, weights: torch.Tensor, pages: PageView) -> torch.Tensor:
    """At which weight each token takes each rank, [T, slices x pages x PAGE] float32.

    The weights get their gradient through it. slots, weights: [T, S].
    """
    each = torch.arange(pages.slots, device=slots.device)
    taken = ((slots.unsqueeze(2) == each) * weights.unsqueeze(2)).sum(1)
    page = torch.arange(pages.pages, device=slots.device)
    first, count = pages.first.unsqueeze(2), pages.count.unsqueeze(2)
    owner = ((page >= first) & (page < first + count)).float().repeat_interleave(PAGE, 2)  # [slices, slots, ranks]
    return taken @ owner.transpose(0, 1).flatten(1)


def shrink_gated(x: torch.Tensor, gates: torch.Tensor, pages: PageView) -> tuple[torch.Tensor, ...]:
    """Of each slice the ranks of all adapters, gated: [..., pages x PAGE] in the dtype of x.

    All of ``pages.A`` is multiplied, that of no slot by zeros: it has to be finite.

    Args:
        x: [T, D] or [N, T, D].
        gates: of :func:`hot_gates`, in the shape of x.
        pages: the adapters.
    """
    A = pages.A.flatten(0, 2).T
    with _without_autocast(x):
        # Three dimensions stay three: each view would be one more step of the way back.
        h = x @ A if x.dim() == 2 else x.bmm(A.expand(len(x), -1, -1))
        return (h * gates).to(x.dtype).split(pages.pages * PAGE, -1)


def expand_gated(y: torch.Tensor, gated: torch.Tensor, pages: PageView, index: int) -> torch.Tensor:
    """y plus the expand of slice ``index``, in place: with gradients best as the base returns it, since a change of a
    view is copied on the way back. y: [..., O of the slice]. gated: of :func:`shrink_gated`."""
    B = pages.b_slice(index).flatten(0, 1)
    with _without_autocast(y):
        if y.dtype != gated.dtype:
            return y.add_(gated @ B)
        return y.addmm_(gated, B) if y.dim() == 2 else y.baddbmm_(gated, B.expand(len(y), -1, -1))


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[None]:
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()
