"""The text of tokens as they come: whole characters only, and nothing that may be the start of a stop text."""

from collections.abc import Sequence
from typing import Any

from molora.streaming import TextDecoder


class Text:
    """Tokens in, text out.

    Args:
        tokenizer: of ``transformers``; None: tokens have no text.
        stop: texts at which it ends; they and what follows are not given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decoder = TextDecoder(tokenizer) if tokenizer is not None else None
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be given out after one more token."""
        return self._give(self._decoder.push(token)) if self._decoder is not None else ""

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        if self._decoder is None:
            return ""
        text = self._give(self._decoder.rest()) + self._held
        self._held = ""
        return text

    def _give(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        first = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if first >= 0:
            self.stopped = True
            text, self._held = self._held[:first], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` may begin."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
