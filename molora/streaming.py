"""Tokens as they are generated, each with the route that produced it."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from molora.outputs import StreamedToken

Route = list[tuple[str, str | None, float]]
_END = object()


class _RouteStreamer(BaseStreamer):
    """Hands over (token id, route) as ``generate`` produces tokens.

    A token's route is that of the position it was predicted from; one step may bring several (prompt lookup).
    """

    def __init__(self, route: Callable[[int], Route], out: "queue.Queue[Any]") -> None:
        self.route = route
        self.out = out
        self.seen = 0  # tokens so far, the prompt's first

    def put(self, value: torch.Tensor) -> None:
        if self.seen:
            for offset, token in enumerate(value.flatten().tolist()):
                self.out.put((token, self.route(self.seen - 1 + offset)))
        self.seen += value.numel()

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class Worker:
    """Runs one piece of work after the other, in a thread that stays as long as this does.

    With a new thread for each, a process that answers for hours grows: glibc gives a thread any one of many heaps, and
    each heap keeps the most that a generation in it ever needed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Worker"], tuple[()]]:
        """A copy, as of a model, has nothing under way."""
        return Worker, ()

    def start(self, work: Callable[[], None]) -> threading.Event:
        """Has ``work``, which raises nothing, done in its turn; what is returned is set when it is."""
        done = threading.Event()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # it is not, where the process has been forked
                self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
                self._thread = threading.Thread(target=_work_through, args=(self._work,), daemon=True)
                self._thread.start()
                weakref.finalize(self, self._work.put, _END)
            self._work.put((work, done))
        return done


def _work_through(queued: "queue.SimpleQueue[Any]") -> None:
    while (item := queued.get()) is not _END:
        work, done = item
        work()
        done.set()
        del item, work, done  # or what they hold would stay until the next


class TextDecoder:
    """Token ids -> text, holding back what is not yet a whole character.

    Only the last few tokens are decoded anew: those since the second last place at which the text was whole, because
    some decoders write a word differently at a beginning.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.before = 0  # where decoding begins
        self.given = 0  # tokens whose text is given out

    def push(self, token: int) -> str:
        """The text that is whole with this token."""
        self.ids.append(token)
        text = self.rest()
        if text.endswith("\ufffd"):
            return ""
        self.before, self.given = self.given, len(self.ids)
        return text

    def rest(self) -> str:
        """The text that is not given out yet, whole or not."""
        given = self._decode(self.ids[self.before : self.given])
        return self._decode(self.ids[self.before :])[len(given) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stream(
    worker: Worker,
    generate: Callable[..., Any],
    route: Callable[[int], Route],
    tokenizer: Any,
    inputs: dict[str, Any],
) -> Iterator[StreamedToken]:
    """Has ``worker`` run ``generate(**inputs)`` and yields its tokens. Closing the iterator stops it.

    Args:
        generate: called with ``inputs`` and a streamer.
        route: the route of a position of the sequence, asked right after the forward that read it.
        tokenizer: None: tokens have no text.
        inputs: input_ids [1, tokens] and the options of generate.
    """
    out: queue.Queue[Any] = queue.Queue()
    stop = _Stop()
    inputs["stopping_criteria"] = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), stop])

    def run() -> None:
        try:
            generate(**inputs, streamer=_RouteStreamer(route, out))
            out.put(_END)
        except BaseException as error:  # handed to the reader, who raises it
            out.put(error)

    ended = worker.start(run)
    decoder = TextDecoder(tokenizer) if tokenizer is not None else None
    held: tuple[int, Route] | None = None  # a token whose character may still be completed by the next
    try:
        while (item := out.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            if held is not None:
                yield StreamedToken(held[0], "", held[1])
                held = None
            text = decoder.push(item[0]) if decoder is not None else ""
            if decoder is not None and decoder.given < len(decoder.ids):
                held = item
            else:
                yield StreamedToken(item[0], text, item[1])
        if held is not None and decoder is not None:
            yield StreamedToken(held[0], decoder.rest(), held[1])
    finally:
        stop.asked.set()
        ended.wait()
