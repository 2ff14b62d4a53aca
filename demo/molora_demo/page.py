"""What every tab works with. Nothing in it is one browser's."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from molora.errors import MoLoRAError
from molora.selection import Choice
from molora_demo.render import Palette, Token, escape
from molora_demo.session import Answer, Running, Tally, answer
from molora_demo.source import Settings, Source, Turn

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Page:
    """
    Args:
        source: answers.
        palette: which colour each adapter has.
        visible: (a browser's key, a selection) -> the selection without what others taught. See ``lessons``.
    """

    source: Source
    palette: Palette
    visible: Callable[[str, dict[str, Choice]], dict[str, Choice]] = lambda key, selection: selection
    running: Running = field(default_factory=Running)
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tally", Tally(self.palette))

    @property
    def generate(self) -> dict[str, Any]:
        """Of events that ask the model: as many at once as it can take, the others wait in Gradio's queue."""
        return {"concurrency_limit": self.source.at_once, "concurrency_id": "generate", "show_progress": "minimal"}

    def answer(
        self,
        key: str,
        turns: Sequence[Turn],
        prompt: str,
        selection: dict[str, Choice],
        settings: Settings,
        stop: threading.Event,
    ) -> Iterator[Answer]:
        """The answer as it grows, for the browser that has ``key``.

        Raises:
            MoLoRAError: it cannot be answered; in words for who asked.
        """

        def ask() -> Iterator[Token]:
            return self.source.ask(turns, prompt, self.visible(key, selection), settings)

        self._bring_in()
        grown = None
        for grown in answer(ask, stop):
            yield grown
        if grown is not None and grown.tokens:
            self.tally.add(grown.tokens, grown.stats)

    def _bring_in(self) -> None:
        """What was promoted since the last answer serves from here on."""
        try:
            if changed := self.source.catch_up():
                gr.Info(escape(f"New: {', '.join(changed)}"))
        except MoLoRAError as error:
            gr.Warning(escape(f"What served goes on serving: {error}"))


def explain(text: str) -> None:
    """What a tab shows, in words for everybody."""
    with gr.Accordion("What am I looking at?", open=False, elem_classes="explain"):
        gr.Markdown(text)
