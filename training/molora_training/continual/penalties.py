"""What holds an adapter back while it learns something new: terms that are added to the loss."""

from collections.abc import Callable, Iterable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def elastic(parameters: Tensors, anchor: Tensors, importance: Tensors, strength: float) -> torch.Tensor:
    """``strength`` / 2 * sum F (theta - theta*)^2: elastic weight consolidation, arXiv 1612.00796, equation 3.

    Args:
        parameters: theta, those that learn.
        anchor: theta*, as they were after what is not to be forgotten.
        importance: F, as of :func:`fisher`.

    Returns:
        A scalar, float32.
    """
    terms = [(importance[name] * (now - anchor[name]).square()).sum() for name, now in parameters.items()]
    return strength / 2 * torch.stack(terms).sum()


def fisher(parameters: Tensors, losses: Iterable[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information: the mean over examples of the squared gradient of their loss.

    Args:
        parameters: those it is wanted of; their ``.grad`` is overwritten.
        losses: for each example a call that gives its negative log-likelihood, summed over the answer's tokens.

    Returns:
        Of each parameter a tensor of its shape, float32, without gradients.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in parameters.items()}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss(), list(parameters.values()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.detach().float().square()
        count += 1
    return {name: of / max(1, count) for name, of in total.items()}


def orthogonal(now: Tensors, before: Iterable[Tensors], strength: float) -> torch.Tensor:
    """``strength`` * sum over adapters and modules of the absolute entries of A_before A_now^T: O-LoRA, arXiv
    2310.14152, as its authors' code has it. It is 0 where what the new adapter reads is orthogonal to what the old ones
    read.

    Args:
        now: A of each module, [rank, in].
        before: the same of each earlier adapter, [its rank, in]; modules that one of the two lacks do not count.

    Returns:
        A scalar.
    """
    one = next(iter(now.values()))
    terms = [(old[name].to(a) @ a.T).abs().sum() for old in before for name, a in now.items() if name in old]
    return strength * torch.stack(terms).sum() if terms else one.new_zeros(())
