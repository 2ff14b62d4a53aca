"""From the engine's thread to a client: events in the event loop, and the answer that is sent while they come."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from molora.errors import AdapterNotFoundError
from molora.serve import pace
from molora.serve.failures import EngineFailure, TimeoutFailure
from molora.serve.metrics import Metrics
from molora.serve.names import UnknownNameError
from molora.serve.pace import ClientGone, Pace
from molora.serve.requests import Event, Finished, Request

if TYPE_CHECKING:
    from molora.serve.engine import Engine, Ticket

log = logging.getLogger("molora.serve")

T = TypeVar("T")


class Answers:
    """The sequences of one HTTP request. Made in the event loop, and to be cancelled there when it ends."""

    def __init__(self, engine: "Engine", metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()  # bounded by the engine's longest sequence
        self._tickets: list[Ticket] = []
        self._cancelled = False
        self._open = 0
        self._heard_at: list[float] = []
        self._started: set[int] = set()
        self._pace = Pace()

    async def submit(self, requests: Sequence[Request]) -> None:
        """Gives them to the engine.

        Raises:
            RequestError, SelectionError, BusyError: as the engine does. It may have begun some of them: cancel those.
        """
        self._open, self._heard_at = len(requests), [time.perf_counter()] * len(requests)
        await asyncio.to_thread(self._submit, requests)

    def cancel(self) -> None:
        """Ends what is under way."""
        self._cancelled = True
        for ticket in list(self._tickets):
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event with the number of its sequence, until all have ended.

        Raises:
            TimeoutFailure, EngineFailure: a sequence was given up. UnknownNameError: a pool did not find an
                adapter. ClientGone: too much lies here for too long.
        """
        while self._open:
            number, event = await self._queue.get()
            self._pace.taken(self._queue.qsize())
            if isinstance(event, Finished):
                self._open -= 1
                _check_end(event)
            yield number, event

    def _submit(self, requests: Sequence[Request]) -> None:
        for number, request in enumerate(requests):
            self._tickets.append(self._engine.submit(request, partial(self._tell, number)))
            if self._cancelled:  # the client left while this thread was at it
                self.cancel()
                return

    def _tell(self, number: int, event: Event) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrive, number, event)

    def _arrive(self, number: int, event: Event) -> None:
        now = time.perf_counter()
        if not isinstance(event, Finished):
            times = self._metrics.token if number in self._started else self._metrics.first_token
            times.observe(now - self._heard_at[number])
            self._started.add(number)
            self._heard_at[number] = now
        self._queue.put_nowait((number, event))
        self._pace.grown(self._queue.qsize())


class EventStream(Response):
    """Server-sent events. A client that leaves, or takes none for long, ends its sequences.

    Args:
        lines: what is sent.
        answers: is cancelled at the end, however that comes.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], answers: Answers) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._answers = lines, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except ClientGone as error:
            log.info("%s", error)
        except TimeoutError:
            log.info("A client has taken nothing for %s s and was cut.", pace.SLOW_S)
        finally:
            self._answers.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            await self._tell(send, line, more=True)
        await self._tell(send, "[DONE]", more=False)

    async def _tell(self, send: Send, line: str, more: bool) -> None:
        async with asyncio.timeout(pace.SLOW_S):
            await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": more})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is ended when the client leaves.

    Raises:
        ClientGone: it did.
    """
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone("A client left before its answer had ended.")
        return job.result()
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_end(event: Finished) -> None:
    if event.reason == "timeout":
        raise TimeoutFailure("The answer took longer than this server allows: timeout. Ask for a shorter one.")
    if event.reason == "cancelled":
        raise EngineFailure("The server is stopping. Ask again later.")
    if isinstance(event.error, AdapterNotFoundError):  # its words tell where it was looked for
        raise UnknownNameError("There is no such adapter as the request names.")
    if event.reason == "error":
        log.error("A request failed in the engine: %s: %s", type(event.error).__name__, event.error)
        raise EngineFailure("The engine failed on this request. Ask again.")
