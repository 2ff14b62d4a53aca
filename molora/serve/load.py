"""Load for a served model: requests of many users at random times, and how they were answered."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molora.errors import BusyError
from molora.selection import Selection
from molora.serve.engine import Engine
from molora.serve.requests import Event, Finished, Request, Sampling
from molora.serve.traffic import Arrival


@dataclass
class Answered:
    """Seconds from the beginning: when it was asked, and when each token, or piece of text, came. count: of the tokens,
    where a piece may be several or none."""

    asked: float
    tokens: list[float] = field(default_factory=list)
    reason: str = "busy"
    count: int | None = None


def replay(
    engine: Engine, coming: Sequence[Arrival], selection: Callable[[int], Selection], tick: Callable[[], None]
) -> list[Answered]:
    """Asks as ``coming`` says and waits for the answers. Whoever is told to come back later does not.

    Args:
        engine: started.
        coming: from :func:`molora.serve.traffic.arrivals`.
        selection: of a user.
        tick: called when an answer is whole.
    """
    vocabulary = int(engine.model.config.get_text_config().vocab_size)
    chance = np.random.default_rng(1)
    left, done = len(coming), threading.Event()
    lock = threading.Lock()
    found: list[Answered] = []
    begun = time.perf_counter()

    def listener(answered: Answered) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            if isinstance(event, Finished):
                answered.reason = event.reason
                end()
            else:
                answered.tokens.append(time.perf_counter() - begun)

        return tell

    def end() -> None:
        nonlocal left
        with lock:
            left -= 1
            tick()
            if not left:
                done.set()

    for one in coming:
        ids = chance.integers(3, vocabulary, one.prompt).tolist()
        time.sleep(max(0.0, begun + one.at - time.perf_counter()))
        found.append(Answered(time.perf_counter() - begun))
        sampling = Sampling(temperature=0, max_tokens=one.answer)
        request = Request(ids, selection(one.user), sampling, user=str(one.user), ends=False)
        try:
            engine.submit(request, listener(found[-1]))
        except BusyError:
            end()
    done.wait()
    return found


def report(found: Sequence[Answered]) -> dict[str, Any]:
    """Tokens and requests a second, and seconds at the 50th, 95th and 99th percentile."""
    whole = [one for one in found if one.reason in ("stop", "length") and one.tokens]
    if not whole:
        return {"answered": 0, **_unanswered(found)}
    span = max(one.tokens[-1] for one in whole) - min(one.asked for one in whole)
    first = [one.tokens[0] - one.asked for one in whole]
    between = [later - earlier for one in whole for earlier, later in zip(one.tokens, one.tokens[1:], strict=False)]
    tokens = sum(len(one.tokens) if one.count is None else one.count for one in whole)
    return {
        "answered": len(whole),
        **_unanswered(found),
        "seconds": round(span, 3),
        "requests a second": round(len(whole) / span, 3),
        "tokens a second": round(tokens / span, 2),
        "seconds to the first token": _percentiles(first),
        "seconds between tokens": _percentiles(between),
    }


def _unanswered(found: Sequence[Answered]) -> dict[str, int]:
    return {
        "refused": sum(one.reason == "busy" for one in found),
        "failed": sum(one.reason in ("error", "timeout", "cancelled") for one in found),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{share}": round(float(np.percentile(values, share)), 4) for share in (50, 95, 99)}
