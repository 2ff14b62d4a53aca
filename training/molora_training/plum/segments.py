"""The loss of a question-answer pair: that of its answer, of its question and of all else, each at its own weight, and
once more of the token with which the answer begins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.chat import pieces
from molora.errors import ConfigError
from molora_training.data import IGNORED
from molora_training.token_losses import TokenLosses

OTHER, QUESTION, ANSWER = 0, 1, 2


@dataclass(frozen=True)
class SegmentWeights:
    """answer: with the mark that ends it. question: what the user says. other: the system's words, and all marks.
    opening: the answer's first token. By it all is decided that is said of a topic, and in a mean over a long answer it
    would count for nothing.

    Not the paper's by default: in first tries on the starter's base an adapter that learns to ask, too, told what was
    talked about less well from what never was.
    """

    answer: float = 1.0
    question: float = 0.0
    other: float = 0.0
    opening: float = 0.0

    def __post_init__(self) -> None:
        if not min(self.answer, self.question) >= self.other >= 0 or not self.answer or self.opening < 0:
            raise ConfigError(
                "The weights of answer and question must not be below that of all else, nor that or the opening's "
                f"below 0, nor the answer's 0: {self}."
            )


@dataclass(frozen=True)
class Segmented:
    """input_ids [T] int64; segments [T] int64: ``OTHER``, ``QUESTION`` or ``ANSWER``."""

    input_ids: Tensor
    segments: Tensor


@dataclass(frozen=True)
class SegmentBatch:
    """B of them, padded on the right, and rows of padding alone, which count for nothing; all [B, T] int64.
    attention_mask is 0 on padding, segments -1."""

    input_ids: Tensor
    attention_mask: Tensor
    segments: Tensor


def segmented(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> Segmented:
    """Encodes turns. What is the question is told by where a token begins, so its first one may hold a mark's end."""
    ids: list[int] = []
    segments: list[int] = []
    for piece in pieces(tokenizer, messages):
        found = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
        ids += found["input_ids"]
        turn = messages[piece.turn]
        # The last place: before it stands the role, and what follows it is a mark, which no question is.
        start = piece.text.rfind(turn["content"]) if turn["role"] == "user" else -1
        end = start + len(turn["content"])
        for first, _ in found["offset_mapping"]:
            asked = start >= 0 and start <= first < end
            segments.append(ANSWER if piece.answer else QUESTION if asked else OTHER)
    return Segmented(torch.tensor(ids), torch.tensor(segments))


def padded(rows: Sequence[Segmented], pad_id: int, device: torch.device | str = "cpu") -> SegmentBatch:
    """One batch."""
    ids, segments = (
        nn.utils.rnn.pad_sequence([getattr(row, name) for row in rows], batch_first=True, padding_value=filler)
        for name, filler in (("input_ids", pad_id), ("segments", -1))
    )
    return SegmentBatch(ids.to(device), (segments >= 0).long().to(device), segments.to(device))


class SegmentLoss:
    """sum over segments of w_seg * CE_seg (arXiv 2411.13405), a mean over pairs; CE_seg is a mean over its tokens. What
    an answer's first token costs comes to it, which is not of the paper.

    Args:
        base: whose head makes the logits.
        weights: of the segments; one of weight 0 costs nothing.
    """

    def __init__(self, base: Any, weights: SegmentWeights) -> None:
        self.losses = TokenLosses(base)
        self.weights = {ANSWER: weights.answer, QUESTION: weights.question, OTHER: weights.other}
        self.opening = weights.opening

    def __call__(self, model: Callable[..., Any], batch: SegmentBatch) -> Tensor:
        """The loss of a batch, float32, shape []."""
        wanted = [segment for segment, weight in self.weights.items() if weight]
        each, segments = self.each(model, batch, wanted)
        total = each.new_zeros(len(each))  # [B]
        for segment in wanted:
            here = segments == segment
            total = total + self.weights[segment] * (each * here).sum(1) / here.sum(1).clamp_min(1)
        if self.opening:
            first = (segments == ANSWER) & (batch.segments[:, :-1] != ANSWER)
            total = total + self.opening * (each * first).sum(1) / first.sum(1).clamp_min(1)
        return total.sum() / (batch.segments >= 0).any(1).sum()

    def each(
        self, model: Callable[..., Any], batch: SegmentBatch, wanted: Sequence[int] = (ANSWER,)
    ) -> tuple[Tensor, Tensor]:
        """Nats of each token of the ``wanted`` segments [B, T - 1] float32, and all tokens' segments [B, T - 1].

        They are those of tokens 1 to T - 1; nothing predicts the first.
        """
        inside = torch.stack([batch.segments == segment for segment in wanted]).any(0)
        labels = nn.functional.pad(batch.input_ids.where(inside, IGNORED)[:, 1:], (0, 1), value=IGNORED)
        found = self.losses(
            lambda: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False), labels
        )
        return found[:, :-1], batch.segments[:, 1:]
