"""One conversation without its page: what the controls mean, what fits the model, and an answer as it grows."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from molora.errors import MoLoRAError
from molora.selection import Choice, Selection
from molora.stack import AUTO, NONE
from molora_demo.render import Stats, Token

REFRESH_S = 0.1  # a redraw sends the whole conversation, so it is not done for every token


@dataclass(frozen=True)
class Turn:
    """A finished pair: plain text for the model, HTML for the page."""

    prompt: str
    answer: str
    html: str


@dataclass(frozen=True)
class Settings:
    """How an answer is generated; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float

    @property
    def generate_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        return kwargs | ({"temperature": self.temperature} if self.temperature > 0 else {})


@dataclass
class Answer:
    """An answer as far as it has come."""

    tokens: list[Token] = field(default_factory=list)
    first_s: float | None = None
    rest_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def stats(self) -> Stats:
        return Stats(len(self.tokens), self.first_s, self.rest_s)


def settle(values: Sequence[str]) -> list[str]:
    """What a multiple choice shows after a click: the last pick wins where "auto" or "none" meets names.

    A browser appends each new pick to the end; an empty choice is "none".
    """
    if not values:
        return [NONE]
    if values[-1] in (AUTO, NONE):
        return [values[-1]]
    return [value for value in values if value not in (AUTO, NONE)]


def choice(value: str | Sequence[str]) -> Choice:
    """A control's value as a selection's: "auto", one name, a list of names, or None for off."""
    names = [value] if isinstance(value, str) else settle(value)
    if len(names) > 1:
        return names
    return None if names[0] == NONE else names[0]


def fitting_messages(
    turns: Sequence[Turn], prompt: str, room: int, count: Callable[[list[dict[str, str]]], int]
) -> list[dict[str, str]]:
    """The conversation with ``prompt`` at its end, without as many of the oldest pairs as it takes to fit.

    Args:
        room: the most tokens that the prompt may have.
        count: the number of tokens of messages rendered for generation.

    Raises:
        MoLoRAError: ``prompt`` alone does not fit.
    """
    for start in range(len(turns) + 1):
        messages = []
        for turn in turns[start:]:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": prompt})
        if (tokens := count(messages)) <= room:
            return messages
    raise MoLoRAError(
        f"Your message has {tokens} tokens and this model can read {max(room, 0)} with the present settings. "
        f"Shorten it, or lower the number of new tokens."
    )


def answer(
    model: Any, messages: list[dict[str, str]], selection: Selection, settings: Settings, stop: threading.Event
) -> Iterator[Answer]:
    """The answer as it grows: the same object, yielded now and then and once at the end.

    Raises:
        MoLoRAError: as ``model.stream`` does.
    """
    result, drawn = Answer(), 0.0
    began = time.perf_counter()
    with closing(model.stream(messages, selection=selection, **settings.generate_kwargs)) as stream:
        for token in stream:
            now = time.perf_counter()
            result.first_s = now - began if result.first_s is None else result.first_s
            result.rest_s = now - began - result.first_s
            result.tokens.append(token)
            if stop.is_set():
                break
            if now - drawn >= REFRESH_S:
                drawn = now
                yield result
    yield result


class Running:
    """Which sessions are generating, so that a session's stop button ends its own answer and no other."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def start(self, session: str) -> threading.Event:
        event = self._events[session] = threading.Event()
        return event

    def stop(self, session: str) -> None:
        if event := self._events.get(session):
            event.set()

    def finish(self, session: str) -> None:
        self._events.pop(session, None)
