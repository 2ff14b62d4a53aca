"""Continuous batching: requests with different stacks run in one batch, and come and go between two of its steps.

One thread runs the model. In each turn it reads some of the prompts of those whose turn it is, then takes one step of
all sequences that are being continued.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from molora.errors import BusyError, RequestError
from molora.model import MoLoRAModel
from molora.serve.batch import Batch
from molora.serve.pool import Pool
from molora.serve.prefixes import Prefixes
from molora.serve.requests import Event, FinishReason, Request
from molora.serve.sampling import Sampler
from molora.serve.text import Text
from molora.serve.ticket import Ticket, names_in
from molora.serve.turns import MOST_OVERTAKEN, Turns

log = logging.getLogger("molora.serve")

_IDLE = 0.5  # seconds after which an engine that has nothing to do looks for what has timed out
_READERS = 4  # threads that bring adapters
_CHUNK, _CHUNK_ON_GPU = 256, 1024


@dataclass(frozen=True)
class Stats:
    """What is under way, and what was done since the start."""

    running: int
    waiting: int
    rows: int
    requests_total: int
    prompt_tokens_total: int
    tokens_total: int


@dataclass(eq=False)
class _Change:
    """Something that is to be done with the stack when nothing runs that it would touch."""

    labels: frozenset[str]  # "layer/adapter"
    make: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None


class Engine:
    """Serves ``model`` to many callers.

    Args:
        model: what serves. Nobody should call its ``generate`` meanwhile: it would wait, and keep others waiting.
        rows: sequences that run at once.
        longest: most tokens of a sequence, prompt and answer.
        chunk: tokens of prompts that are read between two steps; None: 256, on a GPU 1,024.
        waiting: requests that may wait; as many as there are rows always may.
        pools: layers whose adapters come when they are asked for.
        prefix_bytes: of beginnings of prompts that are kept, so that they are not read again.

    Raises:
        BaseModelError: the base keeps something else than the keys and values of all tokens.
    """

    def __init__(
        self,
        model: MoLoRAModel,
        *,
        rows: int = 8,
        longest: int = 2048,
        chunk: int | None = None,
        waiting: int = 256,
        pools: Sequence[Pool] = (),
        prefix_bytes: int = 1 << 28,
    ) -> None:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
        self.model, self.longest = model, min(longest, most)
        self.most_waiting = max(waiting, rows)  # those that begin in the next turn wait, too
        self.chunk = chunk or (_CHUNK_ON_GPU if model.device.type == "cuda" else _CHUNK)
        self.pools = {pool.layer: pool for pool in pools}
        if pools:  # before anything is captured
            model.adapted.reserve(len(model.slots) + sum(pool.most for pool in pools))
        self.prefixes = Prefixes(model, prefix_bytes)
        self._batch = Batch(model, rows, self.longest, self.pools, self.prefixes, self._finish)
        self._turns: Turns[Ticket] = Turns()
        self._changes: list[_Change] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._readers = ThreadPoolExecutor(_READERS, "molora-adapters") if pools else None
        self._requests = 0
        self._pace, self._ended_at = 1.0, time.monotonic()  # seconds a request, smoothed

    def start(self) -> None:
        """Starts the thread that runs the model."""
        self._thread = threading.Thread(target=self._run, name="molora-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it. What is under way or waits is told that it was cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def submit(self, request: Request, tell: Callable[[Event], None]) -> Ticket:
        """Takes a request.

        Args:
            request: what is asked.
            tell: called in one of the engine's threads for each :class:`Piece`, and at last with :class:`Finished`. It
                must not block. An adapter that a pool does not find or cannot use is an error there.

        Raises:
            RequestError: the prompt is empty or too long. SelectionError: it names what the stack does not have.
            BusyError: too many wait.
        """
        most = self._check(request)
        wanted = self._pooled(request)
        ticket = Ticket(
            request,
            tell,
            None if request.timeout_s is None else time.monotonic() + request.timeout_s,
            Sampler.of(request.sampling, request.ids, self.model.device),
            Text(self.model.tokenizer, request.sampling.stop),
            list(request.ids),
            most,
            dict(request.selection or {}),
            coming=bool(wanted),
        )
        with self._wake:
            if self._closing or self._thread is None:
                raise BusyError("The server is not running.", 5.0)
            if len(self._turns) >= self.most_waiting:
                after = max(1.0, len(self._turns) * self._pace)
                raise BusyError(f"{len(self._turns)} requests wait already. Ask again in {after:.0f} s.", after)
            if not (self._turns or self._batch.tickets):
                self._ended_at = time.monotonic()  # the time in which nobody asked is no request's
            self._turns.add(request.user, ticket)
            self._requests += 1
            if wanted and self._readers is not None:
                self._readers.submit(self._bring, ticket, wanted)
            self._wake.notify_all()
        return ticket

    def change(self, labels: Sequence[str], make: Callable[[], Any]) -> Any:
        """Runs ``make``, which changes adapters ``labels`` ("layer/adapter") of the model, once no sequence under way
        may still use them. Requests that would use them wait meanwhile: each sees one version all along.

        Returns:
            What ``make`` returned; what it raised is raised.
        """
        change = _Change(frozenset(labels), make)
        with self._wake:
            if self._closing or self._thread is None:
                return make()
            self._changes.append(change)
            self._wake.notify_all()
        change.done.wait()
        if change.error is not None:
            raise change.error
        return change.result

    @property
    def runs(self) -> bool:
        """Whether its thread is there to answer."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def forget(self) -> None:
        """Counts from zero, and knows no beginnings of prompts; within :meth:`change`."""
        self.prefixes.clear()
        self._batch.prompt_tokens = self._batch.tokens = 0
        with self._wake:
            self._requests, self._pace = 0, 1.0

    def stats(self) -> Stats:
        """Counts; from any thread."""
        batch = self._batch
        with self._wake:
            waiting, requests = len(self._turns), self._requests
        return Stats(len(batch.tickets), waiting, batch.rows.count, requests, batch.prompt_tokens, batch.tokens)

    def _check(self, request: Request) -> int:
        """How many tokens may be generated."""
        room, wanted = self.longest - len(request.ids), request.sampling.max_tokens
        if not request.ids:
            raise RequestError("The prompt is empty.")
        if room < 1:
            raise RequestError(f"The prompt has {len(request.ids)} tokens; with an answer up to {self.longest} fit.")
        if wanted is not None and wanted > room:
            raise RequestError(
                f"The prompt has {len(request.ids)} tokens, so max_tokens can be up to {room}, not {wanted}."
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        if not all(0 <= token < vocabulary for token in request.ids):
            raise RequestError(f"Token ids are from 0 to {vocabulary - 1}.")
        return room if wanted is None else wanted

    def _pooled(self, request: Request) -> list[tuple[Pool, str]]:
        """The adapters that pools have to bring; all else of the selection is checked."""
        rest, wanted = dict(request.selection or {}), []
        for layer, pool in self.pools.items():
            names = names_in(rest.get(layer))
            found = [name for name in names if isinstance(name, str) and pool.owns(name)]
            if not found:
                continue
            if (
                len(found) != len(names)
                or len(found) > pool.most
                or (len(names) > 1 and not isinstance(rest[layer], dict))
            ):
                raise RequestError(f"Layer {layer!r}: {rest[layer]!r} is no choice here. Name one adapter.")
            rest[layer] = None
            wanted += [(pool, name) for name in found]
        self.model._resolve(rest)
        return wanted

    def _bring(self, ticket: Ticket, wanted: list[tuple[Pool, str]]) -> None:
        """Runs in a thread of its own: a store may be slow."""
        if ticket.finished:  # while others were brought
            return
        try:
            ticket.reads = [(pool, pool.read(name)) for pool, name in wanted]
            for pool, read in ticket.reads:
                pool.fetch(read)
        except Exception as error:  # told to the one who asked
            ticket.failed = error
        with self._wake:
            ticket.coming = False
            self._wake.notify_all()

    # All that follows runs in the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._closing:
                    break
                if not (self._batch.tickets or self._turns or self._changes):
                    self._wake.wait()
                    continue
            try:
                self._turn()
            except Exception as error:  # a fault of ours: nobody may wait for ever because of it
                log.exception("The engine failed; what was under way ends with an error.")
                self._end_all("error", error)
        self._end_all("cancelled", None)
        for change in self._changes:
            self._make(change)

    def _turn(self) -> None:
        self._give_up()
        batch = self._batch
        if self._changes or batch.reading or (self._turns and batch.has_room):
            batch.say()  # what comes before the next step may take long
        self._make_changes()
        read = self._read_prompts()
        if self._batch.running:
            self._guarded(list(self._batch.running), self._batch.step)
        elif not read:
            with self._wake:
                if not self._closing:
                    self._wake.wait(_IDLE)

    def _end_all(self, reason: FinishReason, error: Exception | None) -> None:
        with self._wake:
            waiting = self._turns.drop(lambda ticket: True)
        again, self._batch.again = self._batch.again, []
        for ticket in [*self._batch.clear(), *again, *waiting]:
            if not ticket.finished:
                self._finish(ticket, reason, error)

    def _guarded(self, tickets: list[Ticket], work: Callable[[], None]) -> None:
        """Runs a part of a turn; what fails in it ends its requests and no others."""
        try:
            with torch.no_grad():
                work()
        except Exception as error:  # whatever it is, other requests go on
            for ticket in tickets:
                if ticket in self._batch.tickets:
                    self._batch.leave(ticket, "error", error)
                elif not ticket.finished:
                    self._finish(ticket, "error", error)
        again, self._batch.again = self._batch.again, []
        with self._wake:
            for ticket in reversed(again):
                self._turns.add(ticket.request.user, ticket, first=True)

    def _give_up(self) -> None:
        """Ends what was cancelled, has failed or is late."""
        now = time.monotonic()
        with self._wake:
            gone = self._turns.drop(lambda ticket: ticket.why_end(now) is not None)
        for ticket in gone:
            self._finish(ticket, ticket.why_end(now) or "cancelled", None)
        for ticket in self._batch.tickets:
            if (why := ticket.why_end(now)) is not None:
                self._batch.leave(ticket, why)

    def _make_changes(self) -> None:
        with self._wake:
            changes = list(self._changes)
        for change in changes:
            if not any(self._touches(change, ticket) for ticket in self._batch.tickets):
                with self._wake:
                    self._changes.remove(change)
                self._make(change)

    def _make(self, change: _Change) -> None:
        try:
            change.result = change.make()
        except BaseException as error:  # the caller's, who waits for it
            change.error = error
        change.done.set()

    def _touches(self, change: _Change, ticket: Ticket) -> bool:
        """Whether an adapter that changes may act on a sequence."""
        for label in change.labels:
            layer, _, name = label.partition("/")
            if layer not in self.model.stack:
                continue
            choice = ticket.selection.get(layer, self.model.stack[layer].default)
            if choice == "auto" or name in names_in(choice):
                return True
        return False

    def _read_prompts(self) -> int:
        """Reads of the prompts of those in turn about as many tokens as lie between two steps; returns how many."""
        batch, left = self._batch, self.chunk
        while left > 0:
            while batch.has_room and sum(one.unread for one in batch.reading) < left:
                if (ticket := self._next()) is None:
                    break
                self._guarded([ticket], partial(batch.begin, ticket))
            group = batch.group(left)
            if not group:
                break
            if len(group) > 1:
                left -= len(group) * max(one.unread for one in group)  # about, where some is read again
                self._guarded(group, partial(batch.read_together, group))
            else:
                left -= min(group[0].unread, self.chunk)
                self._guarded(group, partial(batch.read, self.chunk))
        return self.chunk - left

    def _next(self) -> Ticket | None:
        """The next one in turn that can begin; its adapters are live then."""
        passed: list[Ticket] = []  # there is no room for their adapters yet

        def ready(ticket: Ticket) -> bool:
            waits = ticket.coming or ticket.failed is not None or ticket in passed
            if ticket.reads and not ticket.leased:
                waits = waits or any(one.overtaken >= MOST_OVERTAKEN for one in passed)
            return not waits and not any(self._touches(change, ticket) for change in self._changes)

        while True:
            with self._wake:
                ticket = self._turns.take(ready)
            if ticket is None or ticket.lease():
                break
            passed.append(ticket)
        if ticket is not None and ticket.reads:
            for one in passed:
                one.overtaken += 1
        with self._wake:
            for one in reversed(passed):
                self._turns.add(one.request.user, one, first=True)
        return ticket

    def _finish(self, ticket: Ticket, reason: FinishReason, error: Exception | None) -> None:
        now = time.monotonic()
        self._pace += 0.1 * (min(60.0, now - self._ended_at) - self._pace)
        self._ended_at = now
        ticket.finish(reason, error)
