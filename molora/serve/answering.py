"""One request from its fields to its answer, whole or as a stream."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from molora.errors import RequestError, SelectionError
from molora.serve.encoding import Encoder
from molora.serve.failures import EngineFailure, TimeoutFailure, stream_error
from molora.serve.keys import Key
from molora.serve.metrics import GONE, Metrics
from molora.serve.names import UnknownNameError, confine, parse_model
from molora.serve.pace import ClientGone
from molora.serve.protocol import ChatRequest, CompletionRequest
from molora.serve.requests import Event, Finished, Request
from molora.serve.shapes import ChatShape, Heard, Shape, TextShape, usage
from molora.serve.stream import Answers, EventStream, until_gone

if TYPE_CHECKING:
    from molora.serve.engine import Engine

Asked = ChatRequest | CompletionRequest
Events = AsyncIterator[tuple[int, Event]]


class Answering:
    """Answers for one engine.

    Args:
        timeout_s: after which a sequence is given up.
    """

    def __init__(self, engine: "Engine", metrics: Metrics, timeout_s: float) -> None:
        self.engine, self.metrics, self.timeout_s = engine, metrics, timeout_s
        self.encoder = Encoder(engine.model)

    async def answer(self, http: HTTPRequest, asked: Asked, key: Key) -> Response:
        """Answers a request of ``key``.

        Raises:
            MoLoRAError: it is refused or fails before anything was sent.
        """
        answers = Answers(self.engine, self.metrics)
        shape = self._shape(asked)
        try:
            events, count = await until_gone(http.receive, self._begin(answers, asked, key))
            if asked.stream:
                return EventStream(_lines(events, count, shape, asked), answers)
            heard = await until_gone(http.receive, _collect(events, count))
        except ClientGone:
            answers.cancel()
            return Response(status_code=GONE)
        except BaseException:
            answers.cancel()
            raise
        return _json(shape.whole(heard, usage(heard, asked.n)))

    async def _begin(self, answers: Answers, asked: Asked, key: Key) -> tuple[Events, int]:
        """Submits, and waits for the first event: until then a failure still has its own status."""
        requests = await asyncio.to_thread(self._requests, asked, key)
        try:
            await answers.submit(requests)
        except SelectionError as error:
            raise self._discreet(error, requests[0]) from error
        events = answers.events()
        return _again(await anext(events), events), len(requests)

    def _requests(self, asked: Asked, key: Key) -> list[Request]:
        """In a thread: a long prompt takes time."""
        model, pools = self.engine.model, self.engine.pools
        named = parse_model(asked.model, model.stack, str(model.base_name), key.user, pools)
        selection = confine({**named, **asked.selection}, model.stack, key.user, pools)
        turn = key.name if key.user is not None else f"{key.name}/{asked.user}"
        return [
            Request(ids, selection, asked.sampling(number), turn, self.timeout_s, asked.routes, not asked.ignore_eos)
            for ids in self.encoder.prompts(asked)
            for number in range(asked.n)
        ]

    def _discreet(self, error: SelectionError, request: Request) -> Exception:
        """The engine's words name a layer's adapters, which of a shared one nobody is told."""
        chosen = request.selection or {}
        if any(layer.shared and chosen.get(layer.name) is not None for layer in self.engine.model.stack.layers):
            return RequestError("This selection does not fit the stack: name one adapter for each shared layer.")
        return error

    def _shape(self, asked: Asked) -> Shape:
        if isinstance(asked, ChatRequest):
            return ChatShape(asked.model, self.encoder.token, asked.logprobs, asked.routes)
        return TextShape(asked.model, self.encoder.token, asked.logprobs is not None, asked.routes)


async def _collect(events: Events, count: int) -> list[Heard]:
    heard = [Heard() for _ in range(count)]
    async for number, event in events:
        heard[number].take(event)
    return heard


async def _lines(events: Events, count: int, shape: Shape, asked: Asked) -> AsyncIterator[str]:
    """A stream's chunks as JSON; a failure is the last of them."""
    heard = [Heard() for _ in range(count)]
    try:
        async for number, event in events:
            if isinstance(event, Finished):
                heard[number].take(event)
                yield _dump(shape.end(number, event))
            elif shape.tells(event):
                yield _dump(shape.chunk(number, event))
    except (TimeoutFailure, EngineFailure, UnknownNameError) as error:
        yield json.dumps(stream_error(error))
        return
    if asked.stream_options.include_usage:
        yield _dump(shape.used(usage(heard, asked.n)))


async def _again(first: tuple[int, Event], rest: Events) -> Events:
    yield first
    async for event in rest:
        yield event


def _dump(reply: Any) -> str:
    return str(reply.model_dump_json(exclude_unset=True))


def _json(reply: Any) -> Response:
    return Response(_dump(reply), media_type="application/json")
