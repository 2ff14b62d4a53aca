"""A hold beside a method's own: what has nothing to do with the adapter stays as the base says it."""

from collections.abc import Sequence
from typing import Any

import torch

from molora_training.adapter_run import Hold
from molora_training.data import Batch, Encoded
from molora_training.token_losses import TokenLosses

ROWS, LENGTH = 4, 256  # conversations a step looks at, and their tokens at most


class Steady:
    """In general conversations the adapter is to foretell what the base does without it (learning without forgetting,
    arXiv 1606.09282, equation 2, with the base as the teacher).

    Args:
        method: the other hold.
        rows: the conversations; a step looks at ROWS of them, the next at those that follow.
    """

    strength = 10.0

    def __init__(self, method: Hold, rows: Sequence[Encoded]) -> None:
        self.method = method
        self.ids = torch.nn.utils.rnn.pad_sequence([row.input_ids[:LENGTH] for row in rows], batch_first=True)
        lengths = torch.tensor([min(LENGTH, row.input_ids.numel()) for row in rows])
        self.mask = torch.arange(self.ids.shape[1]) < lengths[:, None]

    def prepare(self, model: Any) -> None:
        device = next(model.parameters()).device
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)
        self.tokens = TokenLosses(model.get_base_model())
        self.turn = torch.zeros((), dtype=torch.int64, device=device)
        # Before the method, which may have a part of the adapter learn nothing: in the end this has all of it learn.
        with torch.no_grad(), model.disable_adapter():
            taught = [self._states(model, slice(at, at + ROWS)) for at in range(0, len(self.ids), ROWS)]
        self.taught = torch.cat(taught)
        self.method.prepare(model)

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        own = self.method.penalty(model, batch)
        count = len(self.ids)
        rows = (self.turn + torch.arange(min(ROWS, count), device=self.turn.device)) % count
        self.turn += ROWS  # on the device, where a captured step counts on, too
        each = self.tokens.divergences(self._states(model, rows), self.taught[rows])
        mask = self.mask[rows]
        added = self.strength * (each * mask).sum() / mask.sum()
        return added if own is None else own + added

    def _states(self, model: Any, rows: Any) -> torch.Tensor:
        ids, mask = self.ids[rows], self.mask[rows].long()
        return self.tokens.states(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
