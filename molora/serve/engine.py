"""Continuous batching: requests with different stacks run in one batch, and come and go between two of its steps.

One thread runs the model. In each turn it reads a piece of one new prompt into its row, then takes one step of all
sequences that are being continued.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.errors import BusyError, NonFiniteError, RequestError
from molora.model import MoLoRAModel
from molora.outputs import read_plan
from molora.selection import ResolvedSelection, column_layers
from molora.serve.requests import Event, Finished, FinishReason, Piece, Request
from molora.serve.rows import RowReader, Rows
from molora.serve.sampling import Chosen, Sampler, choose
from molora.serve.text import Text
from molora.serve.turns import Turns

_IDLE = 0.5  # seconds after which a sleeping engine looks for what has timed out


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
class Ticket:
    """A request that was taken; :meth:`cancel` may be called from any thread."""

    request: Request
    tell: Callable[[Event], None]
    ends: float | None  # monotonic seconds
    sampler: Sampler
    text: Text
    ids: list[int]  # the prompt, and what was generated
    most: int  # tokens that may be generated
    cancelled: bool = False
    reader: RowReader | None = None
    tokens: int = 0

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def unread(self) -> int:
        """Tokens of ``ids`` that no row holds yet."""
        return len(self.ids) - (self.reader.length if self.reader is not None else 0)


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
        chunk: tokens of a prompt that are read between two steps.
        waiting: requests that may wait.

    Raises:
        BaseModelError: the base keeps something else than the keys and values of all tokens.
    """

    def __init__(
        self, model: MoLoRAModel, *, rows: int = 8, longest: int = 2048, chunk: int = 256, waiting: int = 256
    ) -> None:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
        self.model, self.longest, self.chunk, self.most_waiting = model, min(longest, most), chunk, waiting
        self._rows = Rows(model.base, rows, self.longest)
        self._running: list[Ticket] = []  # by row
        self._reading: Ticket | None = None  # its row is the one after theirs
        self._turns: Turns[Ticket] = Turns()
        self._changes: list[_Change] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._resolved: tuple[Any, list[Ticket], ResolvedSelection] | None = None
        self._requests = self._prompt_tokens = self._tokens = 0
        self._pace = 1.0  # seconds a request, smoothed
        self._ended_at = time.monotonic()
        found = model.generation_config.eos_token_id
        self._ends = frozenset([found] if isinstance(found, int) else found or ())
        self._sdpa = model.config._attn_implementation != "eager"

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

    def submit(self, request: Request, tell: Callable[[Event], None]) -> Ticket:
        """Takes a request.

        Args:
            request: what is asked.
            tell: called in the engine's thread for each :class:`Piece`, and at last with :class:`Finished`. It must not
                block.

        Raises:
            RequestError: the prompt is empty or too long. SelectionError: it names what the stack does not have.
            BusyError: too many wait.
        """
        room = self.longest - len(request.ids)
        if not request.ids:
            raise RequestError("The prompt is empty.")
        if room < 1:
            raise RequestError(f"The prompt has {len(request.ids)} tokens; with an answer up to {self.longest} fit.")
        wanted = request.sampling.max_tokens
        if wanted is not None and wanted > room:
            raise RequestError(
                f"The prompt has {len(request.ids)} tokens, so max_tokens can be up to {room}, not {wanted}."
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        if not all(0 <= token < vocabulary for token in request.ids):
            raise RequestError(f"Token ids are from 0 to {vocabulary - 1}.")
        self.model._resolve(request.selection)
        ticket = Ticket(
            request,
            tell,
            None if request.timeout_s is None else time.monotonic() + request.timeout_s,
            Sampler.of(request.sampling, request.ids, self.model.device),
            Text(self.model.tokenizer, request.sampling.stop),
            list(request.ids),
            room if wanted is None else wanted,
        )
        with self._wake:
            if self._closing or self._thread is None:
                raise BusyError("The server is not running.", 5.0)
            if len(self._turns) >= self.most_waiting:
                after = max(1.0, len(self._turns) * self._pace)
                raise BusyError(f"{len(self._turns)} requests wait already. Ask again in {after:.0f} s.", after)
            self._turns.add(request.user, ticket)
            self._requests += 1
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

    def stats(self) -> Stats:
        """Counts; from any thread."""
        with self._wake:
            running = len(self._running) + (self._reading is not None)
            return Stats(running, len(self._turns), self._rows.count, self._requests, self._prompt_tokens, self._tokens)

    # All that follows runs in the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._closing:
                    break
                if not (self._running or self._reading or self._turns or self._changes):
                    self._wake.wait()
                    continue
            self._give_up()
            self._make_changes()
            read = self._read_prompts()
            if self._running:
                self._guarded(list(self._running), self._step)
            elif not read:
                with self._wake:
                    self._wake.wait(_IDLE)
        for ticket in [*self._running, *([self._reading] if self._reading else []), *self._turns]:
            self._finish(ticket, "cancelled")
        for change in self._changes:
            self._make(change)

    def _guarded(self, tickets: list[Ticket], work: Callable[[], None]) -> None:
        """Runs a part of a turn; what fails in it ends its requests and no others."""
        try:
            with torch.no_grad():
                work()
        except Exception as error:  # whatever it is, other requests go on
            for ticket in tickets:
                self._leave(ticket, "error", error)

    def _give_up(self) -> None:
        """Ends what was cancelled or has timed out."""
        now = time.monotonic()

        def reason(ticket: Ticket) -> FinishReason | None:
            if ticket.cancelled:
                return "cancelled"
            return "timeout" if ticket.ends is not None and now >= ticket.ends else None

        with self._wake:
            gone = self._turns.drop(lambda ticket: reason(ticket) is not None)
        for ticket in gone:
            self._finish(ticket, reason(ticket) or "cancelled")
        for ticket in [*self._running, *([self._reading] if self._reading else [])]:
            if (why := reason(ticket)) is not None:
                self._leave(ticket, why)

    def _make_changes(self) -> None:
        with self._wake:
            changes = list(self._changes)
        for change in changes:
            under_way = [*self._running, *([self._reading] if self._reading else [])]
            if not any(self._touches(change, ticket) for ticket in under_way):
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
        layers = self.model.stack.layers
        chosen = ticket.request.selection or {}
        for label in change.labels:
            layer, _, name = label.partition("/")
            default = next((one.default for one in layers if one.name == layer), None)
            choice: Any = chosen.get(layer, default)
            if choice == "auto" or choice == name or (isinstance(choice, list | tuple | dict) and name in choice):
                return True
        return False

    def _read_prompts(self) -> int:
        """Reads of the prompts of those in turn about as many tokens as lie between two steps; returns how many."""
        left = self.chunk
        while left > 0:
            self._admit()
            if self._reading is None:
                break
            before = self._reading.unread
            left -= min(before, self.chunk)
            self._guarded([self._reading], self._read)
        return self.chunk - left

    def _admit(self) -> None:
        """Gives the next one in turn the row after the running ones."""
        if self._reading is not None or len(self._running) == self._rows.count:
            return
        with self._wake:
            changes = list(self._changes)
            ticket = self._turns.take(lambda one: not any(self._touches(change, one) for change in changes))
        if ticket is not None:
            ticket.reader = self._rows.reader(len(self._running))
            self._reading = ticket

    def _read(self) -> None:
        """A piece of the prompt; after the last, the first token."""
        ticket = self._reading
        assert ticket is not None and ticket.reader is not None
        model, done = self.model, ticket.reader.length
        piece = ticket.ids[done : done + self.chunk]
        ids = torch.tensor([piece], device=model.device)
        positions = torch.arange(done, done + len(piece), device=model.device).unsqueeze(0)
        with model.routing.active(lambda: model._resolve(ticket.request.selection)):
            if self._router_changed():
                return
            output = model.base(
                input_ids=ids,
                position_ids=positions,
                past_key_values=ticket.reader,
                use_cache=True,
                logits_to_keep=1,
            )
            route = self._route(0, -1) if ticket.request.routes else ()
        if ticket.unread:
            return
        if ticket.tokens == 0:
            with self._wake:
                self._prompt_tokens += len(ticket.request.ids)
        self._rows.finish(len(self._running), ticket.reader)
        ticket.reader, self._reading = None, None
        self._running.append(ticket)
        self._take([ticket], choose(output.logits[:, -1], [ticket.sampler]), [route])

    def _step(self) -> None:
        """One more token of each running sequence."""
        model, running = self.model, list(self._running)
        with model.routing.active(self._resolve_running):
            if self._router_changed():
                return
            cache = self._rows.step(len(running))
            ids = torch.tensor([[ticket.ids[-1]] for ticket in running], device=model.device)
            output = model.base(
                input_ids=ids,
                attention_mask=cache.mask(torch.bool if self._sdpa else model.dtype),
                position_ids=cache.positions.unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.done()
            routes = [self._route(row, 0) if one.request.routes else () for row, one in enumerate(running)]
        self._take(running, choose(output.logits[:, -1], [ticket.sampler for ticket in running]), routes)

    def _resolve_running(self) -> ResolvedSelection:
        """What acts on the running sequences; made again when they or the stack have changed."""
        found, layers = self._resolved, self.model.routing.layers
        if found is None or found[0] is not layers or found[1] != self._running:
            chosen = self.model._resolve([ticket.request.selection or {} for ticket in self._running])
            found = self._resolved = (layers, list(self._running), chosen)
        return found[2]

    def _router_changed(self) -> bool:
        """Whether the router is another one than that which read what the rows hold: then all is read anew."""
        reader = self._reading.reader if self._reading is not None else None
        memories = getattr(reader, "routing_memories", None)
        known = memories is None or [memory.owner for memory in memories] == self.model.routing._owners
        if known and (not self._running or self._rows.known_to(self.model.router)):
            return False
        again = [*self._running, *([self._reading] if self._reading else [])]
        self._running, self._reading = [], None
        with self._wake:
            for ticket in reversed(again):
                ticket.reader = None
                self._turns.add(ticket.request.user, ticket, first=True)
        return True

    def _route(self, row: int, place: int) -> tuple[tuple[str, str | None, float], ...]:
        routing = self.model.routing
        plan = routing.plans[-1]
        if plan is None or not plan.shape[-1]:
            return ()
        columns = column_layers(routing.layers, plan.shape[-1])
        return tuple(read_plan(plan.slots[row, place], plan.weights[row, place], self.model.slots.names, columns))

    def _take(self, tickets: list[Ticket], chosen: list[Chosen], routes: Sequence[Any]) -> None:
        """The tokens that were chosen: they are told, and what ends leaves."""
        for ticket, one, route in zip(tickets, chosen, routes, strict=True):
            if one.token < 0:
                self._leave(ticket, "error", NonFiniteError("What acts on this sequence gives no finite numbers."))
                continue
            ticket.ids.append(one.token)
            ticket.tokens += 1
            self._tokens += 1
            ended = one.token in self._ends
            text = "" if ended else ticket.text.add(one.token)
            self._tell(ticket, Piece(one.token, text, one.logprob, one.likeliest, route))
            if ended or ticket.text.stopped:
                self._leave(ticket, "stop")
            elif ticket.tokens >= ticket.most:
                self._leave(ticket, "length")

    def _leave(self, ticket: Ticket, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a sequence; the last running one takes its row, and one that is being read the row after it."""
        if ticket is self._reading:
            self._reading = None
        elif ticket in self._running:
            row, last = self._running.index(ticket), len(self._running) - 1
            if row != last:
                self._rows.move(last, row)
                self._running[row] = self._running[last]
            self._running.pop()
            if self._reading is not None and self._reading.reader is not None:
                self._shift(self._reading.reader)
        self._finish(ticket, reason, error)

    def _shift(self, reader: RowReader) -> None:
        """What is being read goes one row down."""
        row = len(self._running)
        self._rows.lengths[row + 1] = reader.length
        self._rows.move(row + 1, row)
        for layer, (keys, values) in zip(reader.layers, self._rows.memory, strict=True):
            layer.keys, layer.values = keys[row : row + 1], values[row : row + 1]

    def _finish(self, ticket: Ticket, reason: FinishReason, error: Exception | None = None) -> None:
        now = time.monotonic()
        self._pace += 0.1 * (min(60.0, now - self._ended_at) - self._pace)
        self._ended_at = now
        self._tell(ticket, Finished(reason, len(ticket.request.ids), ticket.tokens, ticket.text.rest(), error))

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.tell(event)
        except Exception:  # its own loop may be gone; nobody listens any more
            ticket.cancelled = True
