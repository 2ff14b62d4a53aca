"""A stand-in for the engine: it checks like the real one and says what it was given, from a thread of its own."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from molora.errors import BusyError, RequestError
from molora.selection import candidates, resolve
from molora.serve.prefixes import PrefixStats
from molora.serve.requests import Event, Finished, Piece, Request
from molora.stack import SlotTable, Stack, StackLayer
from tests.unit.spoken import make_tokenizer

TOKENIZER = make_tokenizer()
ROUTE = (("domain", "math", 0.75), ("user", None, 0.0))


def make_stack() -> Stack:
    return Stack(
        [
            StackLayer("personality", {"sage": "x", "pirate": "x"}, default="sage"),
            StackLayer("domain", {"math": "x", "code": "x", "pirate": "x"}),
            StackLayer("user", {"ada": "x", "ben": "x"}, shared=True),
        ]
    )


def slots_of(stack: Stack) -> SlotTable:
    slots = SlotTable()
    for name in stack.names:
        slots.take(name)
    return slots


@dataclass
class Stats:
    running: int = 0
    waiting: int = 0
    rows: int = 8
    requests_total: int = 0
    prompt_tokens_total: int = 0
    tokens_total: int = 0


@dataclass
class FakeTicket:
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeEngine:
    """Says ``script`` one byte a token, then ``ending``; each token waits for ``go`` where there is one."""

    script: str = "Hello there"
    ending: str = "stop"
    delay_s: float = 0.0
    go: threading.Semaphore | None = None
    busy: bool = False
    longest: int = 2048
    requests: list[Request] = field(default_factory=list)
    tickets: list[FakeTicket] = field(default_factory=list)
    counts: Stats = field(default_factory=Stats)
    model: Any = None
    error: Exception = field(default_factory=lambda: ValueError("secret inside"))
    runs: bool = True
    pools: dict[str, Any] = field(default_factory=dict)
    prefixes: Any = field(default_factory=lambda: SimpleNamespace(stats=lambda: PrefixStats(0, 0)))

    def __post_init__(self) -> None:
        if self.model is None:
            stack = make_stack()
            self.model = SimpleNamespace(
                tokenizer=TOKENIZER,
                stack=stack,
                slots=slots_of(stack),
                base_name="org/small",
                adapters={},
                router=object(),
            )

    def submit(self, request: Request, tell: Callable[[Event], None]) -> FakeTicket:
        if self.busy:
            raise BusyError("300 requests wait already.", 6.2)
        if len(request.ids) >= self.longest:
            raise RequestError(f"The prompt has {len(request.ids)} tokens.")
        settled = {of: choice for of, choice in (request.selection or {}).items() if of not in self.pools}
        resolve(settled, self.model.stack, candidates(self.model.stack, self.model.slots), True)
        ticket = FakeTicket()
        self.requests.append(request)
        self.tickets.append(ticket)
        self.counts.requests_total += 1
        self.counts.prompt_tokens_total += len(request.ids)
        threading.Thread(target=self._say, args=(request, tell, ticket), daemon=True).start()
        return ticket

    def _say(self, request: Request, tell: Callable[[Event], None], ticket: FakeTicket) -> None:
        said, reason = 0, self.ending
        for token in TOKENIZER(self.script)["input_ids"]:
            time.sleep(self.delay_s)
            while self.go is not None and not self.go.acquire(timeout=0.01):
                if ticket.cancelled.is_set():
                    break
            if ticket.cancelled.is_set():
                reason = "cancelled"
                break
            if said == (request.sampling.max_tokens or math.inf):
                reason = "length"
                break
            tell(self._piece(request, token))
            said += 1
            self.counts.tokens_total += 1
        error = self.error if reason == "error" else None
        tell(Finished(reason, len(request.ids), said, "", error))  # type: ignore[arg-type]

    def _piece(self, request: Request, token: int) -> Piece:
        count = request.sampling.logprobs
        likeliest = tuple((token + n, -0.5 - n) for n in range(count or 0))
        return Piece(
            token,
            TOKENIZER.decode([token]),
            None if count is None else -0.5,
            likeliest,
            ROUTE if request.routes else (),
        )

    def change(self, labels: Any, make: Callable[[], Any]) -> Any:
        return make()

    def stats(self) -> Stats:
        return self.counts
