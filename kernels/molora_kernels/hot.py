"""The hot set in training: of few adapters all ranks go through dense products, gated in between.

A training step of a large model over few adapters is bound by the host, so these are few calls, each of them one of
PyTorch's own, with its own way back. The ranks of a few adapters widen the base's products by little.
"""

import torch

from molora_kernels.pages import PAGE, PageView


def hot_gates(slots: torch.Tensor, weights: torch.Tensor, pages: PageView) -> tuple[torch.Tensor, ...]:
    """Of each slice: at which weight each token takes each rank, [T, pages x PAGE] float32.

    The weights get their gradient through it. slots, weights: [T, S].
    """
    each = torch.arange(pages.slots, device=slots.device)
    taken = ((slots.unsqueeze(2) == each) * weights.unsqueeze(2)).sum(1)
    page, gates = torch.arange(pages.pages, device=slots.device), []
    for first, count in zip(pages.first.unsqueeze(2), pages.count.unsqueeze(2), strict=True):
        owner = (page >= first) & (page < first + count)  # [slots, pages]
        gates.append(taken @ owner.float().repeat_interleave(PAGE, 1))
    return tuple(gates)


def add_lora_hot(y: torch.Tensor, x: torch.Tensor, gates: tuple[torch.Tensor, ...], pages: PageView) -> torch.Tensor:
    """As :func:`molora_kernels.paged.add_lora_paged`, with gradients. All of ``pages.A`` and ``pages.B`` is multiplied,
    that of no slot by zeros: it has to be finite.

    Args:
        y: [..., sum of the slices' O], of T tokens, changed in place.
        x: [..., D], of as many: both of two or both of three dimensions.
        gates: of :func:`hot_gates`, in the shape of x.
        pages: the adapters.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _add(y, x, gates, pages)
    return _add(y, x, gates, pages)


def _add(y: torch.Tensor, x: torch.Tensor, gates: tuple[torch.Tensor, ...], pages: PageView) -> torch.Tensor:
    start = 0
    for index, (gate, width) in enumerate(zip(gates, pages.outputs, strict=True)):
        A, B = pages.A[index].flatten(0, 1).T, pages.b_slice(index).flatten(0, 1)
        if x.dim() == 3:  # as it is: each view would be one more step of the way back, and a change of one a copy
            A, B = (factor.expand(len(x), -1, -1) for factor in (A, B))
        gated = (x.matmul(A) if x.dim() == 2 else x.bmm(A)) * gate
        gated, part = gated.to(x.dtype), y if len(gates) == 1 else y.narrow(-1, start, width)
        if part.dtype != x.dtype:
            part += gated @ B
        elif part.dim() == 3:
            part.baddbmm_(gated, B)
        else:
            part.addmm_(gated, B)
        start += width
    return y
