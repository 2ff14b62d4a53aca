"""What a base says, and how likely it finds what is right, each prompt under an adapter of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.chat import render
from molora.factors import Factors
from molora.personalize.generated import Generated, generated, stacked
from molora_training.data import IGNORED, Encoded, collate
from molora_training.token_losses import TokenLosses

Own = Sequence[Factors] | None
"""An adapter for each prompt or conversation; None: the base alone."""


class Speaker:
    """A frozen base that is asked many things.

    Args:
        base: on any device. tokenizer: its own.
        batch: prompts at once.
        new_tokens: of an answer, at most.
    """

    def __init__(self, base: Any, tokenizer: Any, batch: int = 32, new_tokens: int = 32) -> None:
        self.base, self.tokenizer, self.batch, self.new_tokens = base, tokenizer, batch, new_tokens
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad = int(tokenizer.pad_token_id or 0)
        self.token_losses = TokenLosses(base)

    def answers(self, prompts: Sequence[str], own: Own = None) -> list[str]:
        """What greedy decoding says to each prompt, a user's turn."""
        rows = [
            render(self.tokenizer, [{"role": "user", "content": one}], add_generation_prompt=True) for one in prompts
        ]
        tokens = [torch.tensor(self.tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows]
        said, acting = [""] * len(prompts), _Acting(own, self.base.device)
        for places in self._batches([len(some) for some in tokens]):
            found = self._said([tokens[place] for place in places], acting(places))
            for place, text in zip(places, found, strict=True):
                said[place] = text
        return said

    @torch.no_grad()
    def losses(self, rows: Sequence[Encoded], own: Own = None) -> Tensor:
        """float64 [N, 2]: the summed loss of each conversation's answer tokens, and how many there are."""
        found, acting = torch.zeros(len(rows), 2, dtype=torch.float64), _Acting(own, self.base.device)
        for places in self._batches([row.input_ids.numel() for row in rows]):
            batch = collate([rows[place] for place in places], self.pad).to(self.base.device)
            labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
            with generated(self.base, acting(places)):
                each = self.token_losses(
                    lambda b=batch: self.base(b.input_ids, attention_mask=b.attention_mask, use_cache=False),  # type: ignore[misc]
                    labels,
                )
            found[places] = torch.stack([each.double().sum(1), (labels != IGNORED).sum(1).double()], 1).cpu()
        return found

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Those of about one length together."""
        order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
        return [order[first : first + self.batch] for first in range(0, len(order), self.batch)]

    @torch.no_grad()
    def _said(self, tokens: Sequence[Tensor], acting: Generated) -> list[str]:
        flipped = [some.flip(0) for some in tokens]  # padded on the left
        ids = nn.utils.rnn.pad_sequence(flipped, batch_first=True, padding_value=self.pad).flip(1)
        lengths = torch.tensor([len(some) for some in tokens])
        mask = (torch.arange(ids.shape[1]).flip(0) < lengths.unsqueeze(1)).long()
        device = self.base.device
        with generated(self.base, acting):
            found = self.base.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=self.new_tokens, do_sample=False,
                eos_token_id=self.end, pad_token_id=self.pad,
            )  # fmt: skip
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found[:, ids.shape[1] :]]


class _Acting:
    """The adapters of a batch, a row for each prompt. Those that come again and again are put together once."""

    def __init__(self, own: Own, device: torch.device) -> None:
        self.own, self.device = own, device
        distinct = {id(one): one for one in own or ()}
        self.places = {key: place for place, key in enumerate(distinct)}
        again = own is not None and 2 * len(distinct) <= len(own)
        self.kept = stacked(list(distinct.values()), device) if again else None

    def __call__(self, places: Sequence[int]) -> Generated:
        if self.own is None:
            return {}
        some = [self.own[place] for place in places]
        if self.kept is None:
            return stacked(some, self.device)
        rows = torch.tensor([self.places[id(one)] for one in some], device=self.device)
        return {name: (A[rows], B[rows]) for name, (A, B) in self.kept.items()}
