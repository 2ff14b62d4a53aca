"""Conversations to token tensors: which tokens are an answer, which pair and which domain each one belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molora.chat import pieces
from molora.errors import DataError

from .items import DOMAINS, USERS, Example, MixedExample, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One conversation of T tokens.

    input_ids [T] int64; labels [T] int64, the token itself inside answers (with their end-of-turn token) and -100
    elsewhere; segments [T] int64, the question-and-answer pair a token belongs to; domain_ids [T] int64, that pair's
    domain as an index into the names given to `encode`.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Tensor
    domain_ids: Tensor


@dataclass(frozen=True)
class Batch:
    """B conversations padded on the right to T tokens; every tensor is [B, T] int64.

    attention_mask is 0 on padding; there labels are -100, segments and domain_ids -1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    segments: Tensor
    domain_ids: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode(
    messages: Sequence[Mapping[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    domains: Sequence[str],
    names: Sequence[str] = (*DOMAINS, *USERS),
    parts: Sequence[Sequence[Part]] = (),
) -> Encoded:
    """Encodes a conversation piece by piece, so that the borders of answers are exact.

    Args:
        messages: turns; a pair begins at each user turn, a leading system turn counts to the first pair.
        tokenizer: of the base model.
        domains: one name a question-and-answer pair.
        names: the domains in the order of their indices.
        parts: of each turn, where turns hold more than one pair.

    Raises:
        DataError: the number of domains is not the number of pairs, a domain is not in `names`, or the parts of a turn
            are not its content.
    """
    return _encoded([_cuts(messages, tokenizer, domains, names, parts)], tokenizer)[0]


def encode_within(
    examples: Sequence[Example | MixedExample],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    names: Sequence[str] = (*DOMAINS, *USERS),
) -> list[Encoded]:
    """Encodes examples and leaves out those longer than `max_tokens`, so that no answer is cut.

    Each text is encoded once, however many examples it is in.

    Raises:
        DataError: as :func:`encode`, and the example is named.
    """
    cuts = []
    for example in examples:
        try:
            cuts.append(_cuts(example.messages, tokenizer, example.domains, names, getattr(example, "parts", ())))
        except DataError as error:
            raise DataError(f"Example {example.id!r}: {error}") from error
    return [one for one in _encoded(cuts, tokenizer) if one.input_ids.numel() <= max_tokens]


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Pads conversations on the right into one batch. Raises DataError when there is none."""
    if not encoded:
        raise DataError("A batch needs at least one conversation.")

    def padded(name: str, filler: int) -> Tensor:
        rows = [getattr(one, name) for one in encoded]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    lengths = torch.tensor([one.input_ids.numel() for one in encoded])  # [B]
    places = torch.arange(int(lengths.max()))  # [T]
    return Batch(
        input_ids=padded("input_ids", pad_id),
        attention_mask=(places < lengths[:, None]).long(),
        labels=padded("labels", IGNORED),
        segments=padded("segments", -1),
        domain_ids=padded("domain_ids", -1),
    )


@dataclass(frozen=True)
class _Cut:
    """A text that is encoded for itself. domain: its index."""

    text: str
    answer: bool
    pair: int
    domain: int


def _cuts(
    messages: Sequence[Mapping[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    domains: Sequence[str],
    names: Sequence[str],
    parts: Sequence[Sequence[Part]],
) -> list[_Cut]:
    """A conversation in pieces; arguments and errors as of `encode`."""
    if parts:
        turns = _checked(messages, parts)
        pairs = 1 + max(part.pair for turn in turns for part in turn)
    else:
        pair_of_turn = _pairs(messages)
        turns = [
            [Part(str(message["content"]), pair, True)] for message, pair in zip(messages, pair_of_turn, strict=True)
        ]
        pairs = pair_of_turn[-1] + 1
    if pairs != len(domains):
        raise DataError(f"The conversation has {pairs} pairs, but {len(domains)} domains were given.")
    unknown = [domain for domain in domains if domain not in names]
    if unknown:
        raise DataError(f"Domain '{unknown[0]}' is not one of {', '.join(names)}.")
    index = [list(names).index(domain) for domain in domains]
    return [
        _Cut(part.text, piece.answer and part.answer, part.pair, index[part.pair])
        for piece in pieces(tokenizer, messages)
        for part in _cut(piece.text, turns[piece.turn])
    ]


def _encoded(conversations: Sequence[Sequence[_Cut]], tokenizer: "PreTrainedTokenizerBase") -> list[Encoded]:
    texts = list(dict.fromkeys(cut.text for cuts in conversations for cut in cuts))
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    ids: dict[str, list[int]] = dict(zip(texts, found, strict=True))

    def one(cuts: Sequence[_Cut]) -> Encoded:
        rows = [
            (token, token if cut.answer else IGNORED, cut.pair, cut.domain) for cut in cuts for token in ids[cut.text]
        ]
        # As lists: a conversation is too short for an operator over it to be worth the call.
        return Encoded(*torch.tensor(rows, dtype=torch.int64).view(-1, 4).T.contiguous().unbind())

    return [one(cuts) for cuts in conversations]


def _cut(text: str, turn: Sequence[Part]) -> list[Part]:
    """A piece of a rendered turn by the turn's parts: what stands before its content goes with the first of them, what
    stands after it with the last."""
    content = "".join(part.text for part in turn)
    start = text.find(content)
    if start < 0:  # marks around the content, rendered apart
        return [replace(turn[0], text=text)]
    if len(turn) == 1:
        return [replace(turn[0], text=text)]
    first, *middle, last = turn
    end = start + len(content)
    return [
        replace(first, text=text[: start + len(first.text)]),
        *middle,
        replace(last, text=text[end - len(last.text) : end] + text[end:]),
    ]


def _checked(messages: Sequence[Mapping[str, str]], parts: Sequence[Sequence[Part]]) -> list[list[Part]]:
    if len(parts) != len(messages):
        raise DataError(f"The conversation has {len(messages)} turns, but parts of {len(parts)} were given.")
    for number, (message, turn) in enumerate(zip(messages, parts, strict=True)):
        if not turn or "".join(part.text for part in turn) != message["content"]:
            raise DataError(f"The parts of turn {number} do not make up its content.")
    return [list(turn) for turn in parts]


def _pairs(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The pair each turn belongs to."""
    pair = -1
    found = []
    for message in messages:
        pair += message.get("role") == "user"
        found.append(max(pair, 0))
    if pair < 0:
        raise DataError("A conversation needs at least one user turn.")
    return found
