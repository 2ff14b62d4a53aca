"""Slow clients of Ray's proxies. A proxy takes an answer from the door as fast as it comes, so only there can anybody
know how much of it the client has taken. Without torch: a proxy needs none of it."""

import asyncio
import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.serve import pace
from molora.serve.pace import ClientGone, Pace, is_stream

log = logging.getLogger("molora.serve")


def middlewares() -> list[Middleware]:
    """Called by Ray in each proxy, which puts them around its app."""
    return [Middleware(CutSlow)]


SETTINGS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.{middlewares.__name__}"}
"""Environment variables of the proxies."""


class CutSlow:
    """Streams at each client's pace, and ends the answers of those that the server alone would cut.

    To ``app`` such a client is one that has left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        line = _Line(receive, send)
        try:
            await self.app(scope, line.receive, line.send)
            await line.taken()
        finally:
            line.close()


class _Line:
    """Between the app and one client: the parts of a stream lie here until the client takes them."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._parts: asyncio.Queue[Message] = asyncio.Queue()  # bounded by the engine's longest sequence
        self._pace = Pace()
        self._cut = asyncio.Event()
        self._job: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        heard, cut = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._cut.wait())
        try:
            await asyncio.wait({heard, cut}, return_when=asyncio.FIRST_COMPLETED)
            return heard.result() if heard.done() else {"type": "http.disconnect"}
        finally:
            heard.cancel()
            cut.cancel()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and is_stream(message):
            self._job = asyncio.ensure_future(self._hand_on())
        if self._job is None:
            return await self._send(message)
        self._parts.put_nowait(message)
        self._pace.grown(self._parts.qsize())

    async def taken(self) -> None:
        """Waits until the client has everything, or was cut."""
        if self._job is not None:
            await self._job

    def close(self) -> None:
        if self._job is not None:
            self._job.cancel()

    async def _hand_on(self) -> None:
        more = True
        try:
            while more:
                message = await self._parts.get()
                self._pace.taken(self._parts.qsize())
                more = message["type"] == "http.response.start" or message.get("more_body", False)
                async with asyncio.timeout(pace.SLOW_S):
                    await self._send(message)
        except (ClientGone, TimeoutError) as error:
            log.info("A client was cut: %s", error or f"it has taken nothing for {pace.SLOW_S} s.")
            self._cut.set()
