"""One rendering of a conversation for training and for running, so that both see the same tokens.

ChatML is written out here instead of through the tokenizer's template, because SmolLM2's template puts a system
message of its own in front, which would be a fixed phrase in every prompt. Other formats go through their template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molora.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_START, _END = "<|im_start|>", "<|im_end|>"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation; `answer` is true for what the assistant has to write."""

    text: str
    answer: bool
    turn: int


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
) -> str:
    """The conversation as one string, without any system message that `messages` does not hold.

    Encode it with `add_special_tokens=False`.

    Raises:
        DataError: a turn has no content or an unknown role.
        BaseModelError: the tokenizer knows no chat format.
    """
    if not messages:
        raise DataError("A conversation needs at least one message.")
    for number, message in enumerate(messages):
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"Message {number} needs a text as 'content' and a 'role' out of {', '.join(_ROLES)}.")
    if not _is_chatml(tokenizer):
        if not tokenizer.chat_template:
            raise BaseModelError("This base has no chat format: its tokenizer carries no chat template.")
        turns = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    text = "".join(f"{_START}{message['role']}\n{message['content']}{_END}\n" for message in messages)
    return f"{text}{_START}assistant\n" if add_generation_prompt else text


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Mapping[str, str]] | str) -> "BatchEncoding":
    """input_ids and attention_mask [1, tokens] of a conversation that is to be answered, or of a text."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    text = render(tokenizer, prompt, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)


def pieces(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    """`render(messages)` cut at the borders of the assistant's answers; an answer holds its end-of-turn token.

    Raises:
        DataError: the chat template changes earlier turns when later ones follow, so that the borders are unknown.
    """
    found: list[Piece] = []
    done = ""
    for turn, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        if is_answer and turn:
            prompt = render(tokenizer, messages[:turn], add_generation_prompt=True)
            found.append(Piece(_rest(prompt, done), False, turn))
            done = prompt
        text = render(tokenizer, messages[: turn + 1])
        fresh = _rest(text, done)
        # What follows the end-of-turn token is layout the model never has to write.
        said = fresh.rstrip() if is_answer else ""
        found.append(Piece(said, True, turn))
        found.append(Piece(fresh[len(said) :], False, turn))
        done = text
    return [piece for piece in found if piece.text]


def _is_chatml(tokenizer: "PreTrainedTokenizerBase") -> bool:
    template = tokenizer.chat_template
    if isinstance(template, str):
        return _START in template and _END in template
    return template is None and {_START, _END} <= tokenizer.get_vocab().keys()


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise DataError("This chat template rewrites earlier turns, so the answers' places in it are unknown.")
    return text[len(start) :]
