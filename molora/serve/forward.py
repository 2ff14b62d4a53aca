"""The door before several replicas: each request goes on to the one that has its user's adapter, and comes back.

It knows of a replica what any ASGI app is: messages. A replica may end at any time; its requests then end with an error
after which the client may ask again, and no others do.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.serve.door import MOST_ADAPTER_BYTES, MOST_BODY_BYTES, CheckHost, CheckKey, LimitBody
from molora.serve.failures import EngineFailure, answer_errors, described, failure, stream_error
from molora.serve.keys import Keys
from molora.serve.metrics import merged
from molora.serve.pace import ClientGone, is_stream
from molora.serve.placement import Crowds
from molora.serve.stream import until_gone

log = logging.getLogger("molora.serve")

TAKEN_S = 30.0  # in which a replica must take a request; how long it may answer, it knows itself
RETRY_S = 1  # after which a client may ask again: another replica is there already
LOST = EngineFailure("The replica that had this request is gone, or none was there to take it. Ask again.")
_KEPT = ("method", "path", "query_string", "headers")
_SCOPE = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""}
_ASKING = ("/v1/chat/completions", "/v1/completions")


class Reply(Protocol):
    """Messages of a replica's answer; the first one only says that it has the request."""

    def __aiter__(self) -> AsyncIterator[Message]: ...

    async def __anext__(self) -> Message: ...

    def cancel(self) -> None: ...


Ask = Callable[[str, Mapping[str, Any], bytes], Reply]
"""(affinity key, ASGI scope, body) -> the answer of the replica that was chosen."""


def build_door(
    ask: Ask,
    measured: Callable[[], Awaitable[Mapping[str, str]]],
    *,
    shared: Collection[str],
    fixed: Callable[[str, str], bool],
    at_once: int,
    keys: Keys | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The app that is asked from outside.

    Args:
        ask: hands a request on.
        measured: gives the metrics of each replica, by its name.
        shared: layers whose adapters are one for each user.
        fixed: whether an adapter (layer, name) is part of the saved stack: one replica must not change it alone.
        at_once: requests for the same adapters that one replica is given at once.
        keys, hosts: as for :func:`molora.serve.app.build_app`.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(merged(await measured()), media_type=CONTENT_TYPE_LATEST)

    app.mount("/", Forward(ask, shared, fixed, at_once))
    answer_errors(app)
    app.add_middleware(
        LimitBody, most=lambda path: MOST_ADAPTER_BYTES if path.startswith("/v1/adapters/") else MOST_BODY_BYTES
    )
    app.add_middleware(CheckKey, keys=keys)
    if hosts is not None:
        app.add_middleware(CheckHost, hosts=hosts)
    return app


class Forward:
    """Hands requests on; see :func:`build_door`."""

    def __init__(self, ask: Ask, shared: Collection[str], fixed: Callable[[str, str], bool], at_once: int) -> None:
        self.ask, self.shared, self.fixed, self.crowds = ask, shared, fixed, Crowds(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await failure(404, "There is no such route.")(scope, receive, send)
        if (refused := self._refused(scope)) is not None:
            return await failure(409, refused, code="fixed_adapter")(scope, receive, send)
        try:
            # What the replica refuses by the key alone may be as large as an upload.
            body = b"" if _refuses(scope) else await _whole(receive)
            with self._place(scope, body) as place:
                await until_gone(receive, self._forward(place, scope, body, send))
        except ClientGone:
            log.info("A client has left; its answer was ended.")

    def _refused(self, scope: Scope) -> str | None:
        """Why an adapter may not be changed here; a key that may change none is answered by the replica."""
        parts = scope["path"].removeprefix("/v1/adapters/").split("/")
        if scope["method"] not in ("POST", "PUT", "DELETE") or _refuses(scope):
            return None
        if len(parts) != 2:
            return None
        if not self.fixed(*parts):
            return None
        return (
            "With several replicas only adapters that a store holds are changed by request. The others are part of "
            "the saved stack: change that, and let the server deploy it again."
        )

    def _place(self, scope: Scope, body: bytes) -> AbstractContextManager[str]:
        """The key by which a replica is chosen; "": any."""
        if scope["path"] in _ASKING:
            return self.crowds.one(affinity(body, self.shared))
        parts = scope["path"].removeprefix("/v1/adapters/").split("/")
        if scope["method"] in ("PUT", "DELETE") and parts[2:] == ["pin"] and parts[0] in self.shared:
            return nullcontext(_hashed({parts[0]: {parts[1]}}))  # where those are answered who ask for it
        return nullcontext("")

    async def _forward(self, key: str, scope: Scope, body: bytes, send: Send) -> None:
        reply = self.ask(key, {name: scope[name] for name in _KEPT}, body)
        streamed: bool | None = None  # None: nothing was sent
        ended = False
        try:
            async for message in _messages(reply):
                if message["type"] == "http.response.start":
                    streamed = is_stream(message)
                ended = message["type"] == "http.response.body" and not message.get("more_body", False)
                await send(message)
        finally:
            reply.cancel()
        if not ended:
            await _tell_lost(streamed, scope, send)


async def _messages(reply: Reply) -> AsyncIterator[Message]:
    """Those of the answer; they end early if the replica does."""
    try:
        async with asyncio.timeout(TAKEN_S):
            await anext(reply)
        async for message in reply:
            yield message
    except Exception as error:  # Ray has many for a replica that is gone, and none of them is the client's business
        log.error("A replica did not answer to the end: %s: %s", type(error).__name__, error)


async def _tell_lost(streamed: bool | None, scope: Scope, send: Send) -> None:
    """Ends an answer that will not be continued, as far as it has come."""
    status, message, code = described(LOST)
    if streamed is None:
        answer = failure(status, message, code=code, headers={"Retry-After": str(RETRY_S)})
        await answer(scope, _nothing, send)
    elif streamed:
        event = f"data: {json.dumps(stream_error(LOST))}\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
    else:
        raise LOST  # the server cuts the connection: half of a JSON object is no answer


def _refuses(scope: Scope) -> bool:
    """Whether a replica lets nobody with this key do that."""
    key = scope.get("state", {}).get("key")
    return scope["path"].startswith("/v1/adapters/") and (key is None or "manage" not in key.scopes)


async def _whole(receive: Receive) -> bytes:
    """A body; how large it may be, LimitBody says."""
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    raise ClientGone("A client left while it sent its request.")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def affinity(body: bytes, shared: Collection[str]) -> str:
    """A key for the adapters of shared layers that a request names, which tells nobody their names; "": none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return ""
    if not isinstance(asked, dict):
        return ""
    model, selection = asked.get("model"), asked.get("selection")
    named: dict[str, set[str]] = {}
    for part in model.split("+")[1:] if isinstance(model, str) else ():
        layer, _, name = part.partition("/")
        if name and layer in shared:
            named.setdefault(layer, set()).add(name)
    for layer, choice in selection.items() if isinstance(selection, dict) else ():
        if layer in shared:
            names = [choice] if isinstance(choice, str) else choice if isinstance(choice, list | dict) else []
            named[layer] = {str(name) for name in names}
    return _hashed(named)


def _hashed(named: Mapping[str, Collection[str]]) -> str:
    """Of adapters by layer; "": none."""
    told = sorted((layer, sorted(names)) for layer, names in named.items() if names)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] if told else ""


async def answer(app: ASGIApp, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
    """A replica's side: what ``app`` sends for a request that was handed on. Closed early, it ends the request."""
    told: asyncio.Queue[Message | None] = asyncio.Queue()  # bounded by the engine's longest sequence
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # that the client has gone, cancels all of this
        raise AssertionError

    async def work() -> None:
        try:
            await app({**_SCOPE, **scope}, receive, told.put)
        finally:
            told.put_nowait(None)

    yield {"type": "taken"}
    job = asyncio.ensure_future(work())
    try:
        while (message := await told.get()) is not None:
            yield message
    finally:
        job.cancel()
        [ended] = await asyncio.gather(job, return_exceptions=True)
        if isinstance(ended, Exception):  # a fault of ours, which was answered already; no server is here to log it
            log.error("A request was not answered to the end.", exc_info=ended)
