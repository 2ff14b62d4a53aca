"""A hold beside a method's own: what has nothing to do with the adapter is answered as the base answers it."""

from collections.abc import Sequence
from typing import Any

import torch

from molora_training.adapter_run import Hold
from molora_training.data import IGNORED, Batch, Encoded
from molora_training.token_losses import TokenLosses

ROWS, LENGTH = 4, 256  # conversations a step looks at, and their tokens at most


class Steady:
    """In the answers of general conversations the adapter is to foretell what the base does without it (learning
    without forgetting, arXiv 1606.09282, equation 2, with the base as the teacher).

    Args:
        method: the other hold, if there is one.
        rows: the conversations; a step looks at ROWS of them, the next at those that follow.
        strength: what their divergence counts beside the loss of what is learnt.
    """

    def __init__(self, method: Hold | None, rows: Sequence[Encoded], strength: float = 10.0) -> None:
        self.method, self.strength = method, strength
        self.ids = torch.nn.utils.rnn.pad_sequence([row.input_ids[:LENGTH] for row in rows], batch_first=True)
        lengths = torch.tensor([min(LENGTH, row.input_ids.numel()) for row in rows])
        self.seen = torch.arange(self.ids.shape[1]) < lengths[:, None]
        # Where the next token is an answer's: what is asked, most of a conversation, is never said by a model.
        answers = [row.labels[1 : LENGTH + 1] != IGNORED for row in rows]
        said = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
        self.said = torch.nn.functional.pad(said, (0, self.ids.shape[1] - said.shape[1])) & self.seen

    def prepare(self, model: Any) -> None:
        device = next(model.parameters()).device
        self.ids, self.seen, self.said = (one.to(device) for one in (self.ids, self.seen, self.said))
        self.tokens = TokenLosses(model.get_base_model())
        self.turn = torch.zeros((), dtype=torch.int64, device=device)
        # Before the method, which may have a part of the adapter learn nothing: in the end this has all of it learn.
        with torch.no_grad(), model.disable_adapter():
            taught = [self._states(model, slice(at, at + ROWS)) for at in range(0, len(self.ids), ROWS)]
        self.taught = torch.cat(taught)
        if self.method is not None:
            self.method.prepare(model)

    def penalty(self, model: Any, batch: Batch) -> torch.Tensor | None:
        own = self.method.penalty(model, batch) if self.method is not None else None
        added = self.drift(model)
        return added if own is None else own + added

    def drift(self, model: Any) -> torch.Tensor:
        """What is added to a step's loss for the next rows; a scalar."""
        count = len(self.ids)
        rows = (self.turn + torch.arange(min(ROWS, count), device=self.turn.device)) % count
        self.turn += ROWS  # on the device, where a captured step counts on, too
        each = self.tokens.divergences(self._states(model, rows), self.taught[rows])
        said = self.said[rows]
        return self.strength * (each * said).sum() / said.sum().clamp_min(1)

    def _states(self, model: Any, rows: Any) -> torch.Tensor:
        ids, mask = self.ids[rows], self.seen[rows].long()
        return self.tokens.states(lambda: model(input_ids=ids, attention_mask=mask, use_cache=False))
