"""A small adapter on top of generated factors, which stay as they are (Merge-then-Adapt, arXiv 2511.20072, stage 3)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from molora.errors import NonFiniteError
from molora.personalize.factors import Factors
from molora_training.batches import plan_steps
from molora_training.data import IGNORED, Encoded, collate
from molora_training.generated import generated
from molora_training.schedule import warm_cosine
from molora_training.token_losses import TokenLosses

_CLIP_NORM = 1.0


def train_on_top(
    base: Any,
    below: Factors,
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    rank: int = 4,
    learning_rate: float = 5e-5,
    epochs: int = 1,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> Factors:
    """An adapter of ``rank`` in the modules of ``below``, which acts beside it.

    Args:
        base: frozen, on any device.
        below: what acts and stays.
        rows: conversations to learn from.
        pad_id: of the tokenizer.
        rank, learning_rate, epochs: as in the paper's code; alpha is the rank. batch_tokens: padded tokens in a step.
        seed: of the order and of A.

    Returns:
        The new adapter alone, float32, on the CPU.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    device = base.device
    chance = torch.Generator().manual_seed(seed)
    fixed = {name: (A[None].to(device), B[None].to(device)) for name, (A, B) in below.items()}
    own = {}
    for name, (A, B) in below.items():
        start = (torch.rand(rank, A.shape[1], generator=chance) * 2 - 1) * A.shape[1] ** -0.5
        own[name] = (nn.Parameter(start.to(device)), nn.Parameter(torch.zeros(len(B), rank, device=device)))
    parameters = [factor for pair in own.values() for factor in pair]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    losses = TokenLosses(base)
    steps = plan_steps([row.input_ids.numel() for row in rows], batch_tokens, epochs, 1, seed)
    for number, (indices,) in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(number, len(steps), 0.1, learning_rate)
        batch = collate([rows[index] for index in indices], pad_id).to(device)
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        top = {name: (A[None], B[None]) for name, (A, B) in own.items()}
        with generated(base, fixed), generated(base, top):
            each = losses(
                lambda b=batch: base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                labels,
            )
        loss = each.sum() / (labels != IGNORED).sum().clamp_min(1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            raise NonFiniteError(f"The loss became {float(loss)} at step {number + 1}, its gradient {float(norm)}.")
        optimizer.step()
    return {name: (A.detach().cpu(), B.detach().cpu()) for name, (A, B) in own.items()}
