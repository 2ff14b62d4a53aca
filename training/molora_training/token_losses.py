"""The loss of each token, and its distance from a teacher, without the logits of all.

Those of a vocabulary are most of a training step's memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from molora_training.data import IGNORED

CHUNK = 1024  # tokens whose logits are there at a time


class TokenLosses:
    """Cross-entropy of a causal model's tokens, in a few rows of logits at a time.

    Where the base changes what its head gives (a soft cap, a scale), or the head learns or is wrapped, all logits are
    made at once as ever: the losses are the same.

    Args:
        base: a causal language model of `transformers`.
    """

    def __init__(self, base: Any) -> None:
        self.head = base.get_output_embeddings()
        self.plain = type(self.head) is nn.Linear and _ends_with(base, self.head)

    def __call__(self, forward: Callable[[], Any], labels: torch.Tensor) -> torch.Tensor:
        """[B, T] float32: the loss of each label; 0 where that is ``IGNORED``.

        Args:
            forward: runs the model and gives its output, or what has ``logits`` [B, T, vocabulary].
            labels: [B, T], what each position is to predict.
        """
        if not self.chunks:
            logits = forward().logits.flatten(0, 1).float()
            each = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        else:
            hidden = self.states(forward).flatten(0, 1)
            weight, wanted = self._weight(hidden), labels.flatten()
            if hidden.device.type == "cpu":  # to take those that are asked for alone, a GPU would have to be waited for
                asked = (wanted != IGNORED).nonzero().squeeze(1)
                own = _Chunked.apply(hidden[asked], weight, self.head.bias, wanted[asked])
                each = torch.zeros(len(wanted)).index_copy(0, asked, own)
            else:
                each = _Chunked.apply(hidden, weight, self.head.bias, wanted)
        return each.view(labels.shape)

    def states(self, forward: Callable[[], Any]) -> torch.Tensor:
        """What tells a model's distributions: [B, T, hidden] before its head; the logits where the head is not all."""
        if not self.chunks:
            logits: torch.Tensor = forward().logits
            return logits
        with _left_out(self.head):
            hidden: torch.Tensor = forward().logits
        return hidden

    def divergences(self, states: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """[B, T] float32, nats: the Kullback-Leibler divergence of what the model says from what it is taught.

        Args:
            states, taught: of :meth:`states`, of the same places. Only the first are learnt by.
        """
        said, wanted = states.flatten(0, 1), taught.flatten(0, 1)
        if self.chunks:
            each = _ChunkedDivergence.apply(said, wanted, self._weight(said), self.head.bias)
        else:
            said, wanted = said.float().log_softmax(-1), wanted.float().log_softmax(-1)
            each = nn.functional.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
        return each.view(states.shape[:2])

    @property
    def chunks(self) -> bool:
        """Whether the head is a plain product that learns nothing, so that its logits need not all be there at once."""
        head = self.head
        return self.plain and not (head.weight.requires_grad or head._forward_hooks or head._forward_pre_hooks)

    def _weight(self, hidden: torch.Tensor) -> torch.Tensor:
        kind = hidden.device.type
        weight: torch.Tensor = self.head.weight
        return weight.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype)


class _Chunked(torch.autograd.Function):
    """A token's loss depends on its own hidden state alone, so its slope is known as soon as its logits are, and only
    the slopes are kept: [N, hidden]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        each = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            left_out, wanted = labels[part] == IGNORED, labels[part].clamp_min(0).unsqueeze(1)
            logits = nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
            likely = logits.log_softmax(-1)
            each[part] = -likely.gather(1, wanted).squeeze(1).masked_fill(left_out, 0.0)
            if slopes is not None:
                change = likely.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=torch.float32))
                slopes[part] = (change.to(weight.dtype) @ weight).masked_fill(left_out.unsqueeze(1), 0.0)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return each

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slopes).to(slopes.dtype), None, None, None


class _ChunkedDivergence(torch.autograd.Function):
    """As :class:`_Chunked`: the slope at a logit is what is said of it less what is taught."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, taught: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        each = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            said, wanted = (
                nn.functional.linear(states[part].to(weight.dtype), weight, bias).float().log_softmax(-1)
                for states in (hidden, taught)
            )
            likely = wanted.exp()
            each[part] = (likely * (wanted - said)).sum(-1)
            slopes[part] = (said.exp_() - likely).to(weight.dtype) @ weight
        ctx.save_for_backward(slopes)
        return each

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slopes).to(slopes.dtype), None, None, None


@contextmanager
def _left_out(head: nn.Linear) -> Iterator[None]:
    """The head hands its hidden states on."""
    head.forward = lambda hidden: hidden  # type: ignore
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def _ends_with(base: Any, head: nn.Linear) -> bool:
    """Whether the logits of ``base`` are what its head gives."""
    given: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        logits = base(torch.ones(1, 1, dtype=torch.int64, device=head.weight.device), use_cache=False).logits
    finally:
        hook.remove()
    return len(given) == 1 and torch.equal(given[0], logits)
