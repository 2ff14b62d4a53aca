"""Before anyone asks: answers of all sizes, so that nobody waits for a capture, or for a kernel to be compiled."""

import queue
import threading
import time

from molora.serve.engine import Engine
from molora.serve.requests import Event, Finished, Request, Sampling

_PROMPT, _ANSWER = 24, 3  # tokens


def warm(engine: Engine) -> float:
    """Lets an engine that was started, and was asked nothing yet, answer one, two, four ... prompts at once, and one of
    each size for which kernels are compiled, up to as many tokens as it reads between two steps; the longest twice,
    since the second time its beginning is known. It then counts from zero. On a CPU it brings nothing.

    Returns:
        The seconds that it took.
    """
    began, rows = time.perf_counter(), engine.stats().rows
    long = min(engine.chunk, engine.longest - _ANSWER)
    short = min(_PROMPT, long)
    # Tiles are of the nearest power of two.
    singles = [_PROMPT << power for power in range(1, (long // _PROMPT).bit_length())]
    sizes = [1 << power for power in range(rows.bit_length())]
    for lengths in [
        *([length] for length in [*singles, long, long]),
        *([short] * size for size in sizes),
        [short] * rows,
    ]:
        _answer(engine, lengths)
    engine.change([], engine.forget)
    return time.perf_counter() - began


def _answer(engine: Engine, lengths: list[int]) -> None:
    """Prompts of these lengths, all of which begin in the same turn."""
    heard: queue.Queue[Event] = queue.Queue()
    go = threading.Event()
    holder = threading.Thread(target=engine.change, args=([], go.wait))
    holder.start()
    try:
        for number, length in enumerate(lengths):
            ids = [number + 1, *[0] * (length - 1)]
            engine.submit(Request(ids, None, Sampling(temperature=0, max_tokens=_ANSWER), ends=False), heard.put)
    finally:
        go.set()
        holder.join()
    left = len(lengths)
    while left:
        left -= isinstance(heard.get(), Finished)
