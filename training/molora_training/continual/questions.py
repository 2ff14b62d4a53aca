"""What stands for a question: what keyed layers are told by, and its last token beside it."""

from collections.abc import Sequence
from typing import Any

import torch

from molora.keys import entering
from molora_training.batches import plan_pass
from molora_training.data import IGNORED, Encoded, collate

MEAN, LAST = 0, 1  # the two that stand for it: what it is about, and what it asks for in the end


@torch.no_grad()
def represented(base: Any, rows: Sequence[Encoded], pad_id: int, batch_tokens: int) -> torch.Tensor:
    """[rows, 2, hidden] float32: of what :func:`molora.keys.entering` gives of ``base``, without adapters, the MEAN
    over the tokens before each conversation's first answer, and the LAST of them."""
    found = torch.empty(len(rows), 2, base.config.hidden_size)
    for indices in plan_pass([len(row.input_ids) for row in rows], batch_tokens):
        batch = collate([rows[index] for index in indices], pad_id).to(base.device)
        states = entering(base, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        asked = ((batch.labels != IGNORED).cumsum(1) == 0) & batch.attention_mask.bool()
        counts = asked.sum(1)
        found[indices, MEAN] = ((states * asked.unsqueeze(2)).sum(1) / counts.unsqueeze(1)).cpu()
        found[indices, LAST] = states[torch.arange(len(indices), device=states.device), counts - 1].cpu()
    return found
