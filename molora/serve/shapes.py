"""Pieces as OpenAI's objects: chats and plain completions, whole and in chunks."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from molora.serve import replies
from molora.serve.requests import Event, Finished, Piece

_LEAST_LOGPROB = -9999.0  # JSON knows no infinity; OpenAI writes this
TokenText = Callable[[int], str]


@dataclass
class Heard:
    """What has come of one sequence."""

    pieces: list[Piece] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.pieces.append(event)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces) + (self.finished.text if self.finished else "")


def usage(sequences: Sequence[Heard], n: int) -> replies.Usage:
    """Of a request with ``n`` choices for each prompt, which is counted once."""
    ends = [one.finished for one in sequences]
    prompt = sum(end.prompt_tokens for end in ends[::n] if end is not None)
    generated = sum(end.tokens for end in ends if end is not None)
    return replies.Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class _Shape:
    """One answer's objects.

    Args:
        model: as the client named it.
        token: the text of a token.
        logprobs, routes: whether they were asked for.
    """

    prefix: ClassVar[str]

    def __init__(self, model: str, token: TokenText, logprobs: bool, routes: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.model, self.created = model, int(time.time())
        self.token, self.with_logprobs, self.with_routes = token, logprobs, routes

    def tells(self, piece: Piece) -> bool:
        """Whether a piece is worth a chunk."""
        return bool(piece.text) or self.with_logprobs or self.with_routes

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _route(self, piece: Piece) -> dict[str, Any]:
        return {"routes": list(piece.route)} if self.with_routes else {}

    def _routes(self, sequence: Heard) -> dict[str, Any]:
        return {"routes": [list(piece.route) for piece in sequence.pieces]} if self.with_routes else {}


class ChatShape(_Shape):
    prefix = "chatcmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._begun: set[int] = set()

    def chunk(self, number: int, piece: Piece) -> replies.ChatChunk:
        choice = replies.ChatChunkChoice(
            index=number,
            delta=self._delta(number, piece.text),
            finish_reason=None,
            logprobs=self._logprobs([piece]),
        )
        head = self._head("chat.completion.chunk") | self._route(piece)
        return replies.ChatChunk(**head, choices=[choice])

    def end(self, number: int, finished: Finished) -> replies.ChatChunk:
        delta = self._delta(number, finished.text) if finished.text else replies.Delta()
        choice = replies.ChatChunkChoice(index=number, delta=delta, finish_reason=finished.reason, logprobs=None)
        return replies.ChatChunk(**self._head("chat.completion.chunk"), choices=[choice])

    def used(self, used: replies.Usage) -> replies.ChatChunk:
        return replies.ChatChunk(**self._head("chat.completion.chunk"), choices=[], usage=used)

    def whole(self, sequences: Sequence[Heard], used: replies.Usage) -> replies.Chat:
        choices = [
            replies.ChatChoice(
                index=number,
                message=replies.AnswerMessage(role="assistant", content=one.text, refusal=None),
                finish_reason=one.finished.reason if one.finished else None,
                logprobs=self._logprobs(one.pieces),
                **self._routes(one),
            )
            for number, one in enumerate(sequences)
        ]
        return replies.Chat(**self._head("chat.completion"), choices=choices, usage=used)

    def _delta(self, number: int, text: str) -> replies.Delta:
        if number in self._begun:
            return replies.Delta(content=text)
        self._begun.add(number)
        return replies.Delta(role="assistant", content=text)

    def _logprobs(self, pieces: Sequence[Piece]) -> replies.ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        content = [
            replies.TokenLogprob(
                **self._likely(piece.token, piece.logprob),
                top_logprobs=[replies.Likely(**self._likely(*one)) for one in piece.likeliest],
            )
            for piece in pieces
        ]
        return replies.ChatLogprobs(content=content, refusal=None)

    def _likely(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token(token)
        # A part of a character has no text, and its bytes are not known here.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


class TextShape(_Shape):
    prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets: dict[int, int] = {}

    def chunk(self, number: int, piece: Piece) -> replies.Text:
        return self._one(number, piece.text, None, self._logprobs(number, [piece]), **self._route(piece))

    def end(self, number: int, finished: Finished) -> replies.Text:
        return self._one(number, finished.text, finished.reason, None)

    def used(self, used: replies.Usage) -> replies.Text:
        return replies.Text(**self._head("text_completion"), choices=[], usage=used)

    def whole(self, sequences: Sequence[Heard], used: replies.Usage) -> replies.Text:
        choices = [
            replies.TextChoice(
                index=number,
                text=one.text,
                finish_reason=one.finished.reason if one.finished else None,
                logprobs=self._logprobs(number, one.pieces),
                **self._routes(one),
            )
            for number, one in enumerate(sequences)
        ]
        return replies.Text(**self._head("text_completion"), choices=choices, usage=used)

    def _one(
        self, number: int, text: str, reason: str | None, logprobs: replies.TextLogprobs | None, **routes: Any
    ) -> replies.Text:
        choice = replies.TextChoice(index=number, text=text, finish_reason=reason, logprobs=logprobs)
        return replies.Text(**self._head("text_completion"), choices=[choice], **routes)

    def _logprobs(self, number: int, pieces: Sequence[Piece]) -> replies.TextLogprobs | None:
        if not self.with_logprobs:
            return None
        tokens = [self.token(piece.token) for piece in pieces]
        offsets = []
        for text in tokens:
            offsets.append(self._offsets.get(number, 0))
            self._offsets[number] = offsets[-1] + len(text)
        return replies.TextLogprobs(
            tokens=tokens,
            token_logprobs=[_finite(piece.logprob) for piece in pieces],
            top_logprobs=[{self.token(token): _finite(value) for token, value in one.likeliest} for one in pieces],
            text_offset=offsets,
        )


Shape = ChatShape | TextShape


def _finite(logprob: float | None) -> float:
    return max(logprob if logprob is not None else _LEAST_LOGPROB, _LEAST_LOGPROB)
