"""Gates of Personalized Pieces: for each module of an adapter a vector that tells the inputs that it was made for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter import Adapter
from molora.errors import NonFiniteError
from molora_training.batches import plan_steps
from molora_training.data import IGNORED, Encoded, collate
from molora_training.token_losses import TokenLosses


def train_gates(
    base: Any,
    adapter: Adapter,
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    epochs: int = 2,
    learning_rate: float = 2e-5,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The gates of a frozen adapter, from what it learnt itself: delta(sigmoid(x . g) x), g at first zero.

    Args:
        base: frozen, on any device.
        adapter: the sharer's.
        rows: conversations of the sharer's.
        pad_id: of the tokenizer.
        epochs, learning_rate: as in the paper's code. batch_tokens: padded tokens in a step.
        seed: of the order.

    Returns:
        By module [in], float32, on the CPU.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    device = base.device
    gates = {
        name: nn.Parameter(torch.zeros(weights.A.shape[1], device=device)) for name, weights in adapter.modules.items()
    }
    optimizer = torch.optim.AdamW(gates.values(), learning_rate, weight_decay=0.0)
    losses = TokenLosses(base)
    steps = plan_steps([row.input_ids.numel() for row in rows], batch_tokens, epochs, 1, seed)
    for number, (indices,) in enumerate(steps):
        batch = collate([rows[index] for index in indices], pad_id).to(device)
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        with gated(base, adapter, gates):
            each = losses(
                lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                labels,
            )
        loss = each.sum() / (labels != IGNORED).sum().clamp_min(1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteError(f"The loss of the gates became {float(loss.detach())} at step {number + 1}.")
        optimizer.step()
    return {name: gate.detach().cpu() for name, gate in gates.items()}


@contextmanager
def gated(base: Any, adapter: Adapter, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """``base`` with the adapter behind its gates."""
    hooks = []
    try:
        for name, weights in adapter.modules.items():
            A, B = (factor.to(base.device, base.dtype) for factor in (weights.A, weights.B * weights.scale))
            hooks.append(base.get_submodule(name).register_forward_hook(_gate(A, B, gates[name])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gate(A: Tensor, B: Tensor, gate: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        x = inputs[0]  # [B, T, in]
        open_ = torch.sigmoid(x.float() @ gate).unsqueeze(-1).to(x.dtype)
        return y + open_ * nn.functional.linear(nn.functional.linear(x, A), B)

    return hook
