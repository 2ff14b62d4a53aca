"""Tokens as they are generated, each with the route that produced it."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from molora.outputs import StreamedToken

Route = list[tuple[str, str | None, float]]
_END = object()


class _RouteStreamer(BaseStreamer):
    """Hands over (token id, route) as ``generate`` produces tokens."""

    def __init__(self, route: Callable[[], Route], out: "queue.Queue[Any]") -> None:
        self.route = route
        self.out = out
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        for token in value.flatten().tolist():
            self.out.put((token, self.route()))

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class TextDecoder:
    """Token ids -> text, holding back what is not yet a whole character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # characters of the current piece already given out

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            return ""
        new = text[self.shown :]
        self.shown = len(text)
        if text.endswith("\n"):  # a safe place to begin anew, so that decoding stays linear
            self.ids, self.shown = [], 0
        return new


def stream(
    generate: Callable[..., Any], route: Callable[[], Route], tokenizer: Any, inputs: dict[str, Any]
) -> Iterator[StreamedToken]:
    """Runs ``generate(**inputs)`` in a thread and yields its tokens. Closing the iterator stops it."""
    out: queue.Queue[Any] = queue.Queue()
    stop = _Stop()
    inputs["stopping_criteria"] = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), stop])

    def run() -> None:
        try:
            generate(**inputs, streamer=_RouteStreamer(route, out))
            out.put(_END)
        except BaseException as error:  # handed to the reader, who raises it
            out.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    decoder = TextDecoder(tokenizer)
    try:
        while (item := out.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield StreamedToken(item[0], decoder.push(item[0]), item[1])
    finally:
        stop.asked.set()
        thread.join()
