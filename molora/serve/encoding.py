"""A request's text as tokens, and tokens as text for logprobs; from any thread."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from molora.chat import render
from molora.errors import BaseModelError, RequestError
from molora.serve.protocol import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    from molora import MoLoRAModel


class Encoder:
    """Uses the model's tokenizer, one call at a time: calls may change its settings for a moment.

    Raises:
        BaseModelError: it has none.
    """

    def __init__(self, model: "MoLoRAModel") -> None:
        if model.tokenizer is None:
            raise BaseModelError("This model has no tokenizer, which the server needs.")
        self._tokenizer: Any = model.tokenizer
        self._lock = threading.Lock()
        self.token = lru_cache(maxsize=8192)(self._token)

    def prompts(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        """The tokens of a request's prompts.

        Raises:
            RequestError: a text is no text. DataError: the messages are no conversation.
        """
        if isinstance(asked, ChatRequest):
            text = render(self._tokenizer, [message.plain() for message in asked.messages], add_generation_prompt=True)
            return [self._encode(text, special=False)]
        return [self._encode(one, special=True) if isinstance(one, str) else one for one in asked.prompt]

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            with self._lock:
                ids: Sequence[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        except (UnicodeError, TypeError) as error:  # half a surrogate pair
            raise RequestError("The prompt holds characters that are none in Unicode.") from error
        return list(ids)

    def _token(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
