"""What runs for a browser: an answer as it grows, its stop button, and what adapters have said since the start."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from molora.stack import StackLayer
from molora_demo.render import Palette, Route, Stats, Token, speaker

REFRESH_S = 0.3  # a redraw costs the browser, which shares the cores with the model, so it is not done for every token
RECENT = 50  # answers whose pace is told


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


@dataclass(frozen=True)
class Named:
    """A token whose adapters are called as their owner calls them."""

    text: str
    route: Route


def answer(
    ask: Callable[[], Iterator[Token]], stop: threading.Event, titles: Mapping[str, str] | None = None
) -> Iterator[Answer]:
    """The answer as it grows: the same object, yielded now and then and once at the end.

    Args:
        ask: begins the tokens, which are closed at the end.
        stop: ends it early.
        titles: of adapters that are to be called otherwise.

    Raises:
        MoLoRAError: as ``ask`` does.
    """
    result, drawn = Answer(), 0.0
    began = time.perf_counter()
    with closing(ask()) as stream:  # type: ignore[type-var]
        for token in stream:
            now = time.perf_counter()
            result.first_s = now - began if result.first_s is None else result.first_s
            result.rest_s = now - began - result.first_s
            if titles:
                token = Named(
                    token.text, [(layer, titles.get(name or "", name), weight) for layer, name, weight in token.route]
                )
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

    def __len__(self) -> int:
        return len(self._events)

    def start(self, session: str) -> threading.Event:
        event = self._events[session] = threading.Event()
        return event

    def stop(self, session: str) -> None:
        if event := self._events.get(session):
            event.set()

    def finish(self, session: str) -> None:
        self._events.pop(session, None)


class Tally:
    """How many tokens each adapter has spoken since the start, and how fast the last answers were. Of no one's text
    and under no one's own names: what only one browser has, counts as ``OWN``."""

    OWN = "taught by one browser"

    def __init__(self, palette: Palette, public: Callable[[StackLayer], Sequence[str]]) -> None:
        self._palette, self._public, self._lock = palette, public, threading.Lock()
        self.spoken: dict[str, Counter[str | None]] = {layer.name: Counter() for layer in palette.layers}
        self.answers = 0
        self.recent: deque[Stats] = deque(maxlen=RECENT)

    def add(self, tokens: Sequence[Token], stats: Stats) -> None:
        """Counts an answer."""
        with self._lock:
            self.answers += 1
            self.recent.append(stats)
            for layer in self._palette.layers:
                public = self._public(layer)
                for token in tokens:
                    name = speaker(token.route, layer.name)
                    self.spoken[layer.name][name if name is None or name in public else self.OWN] += 1
