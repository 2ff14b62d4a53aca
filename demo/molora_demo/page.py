"""What every tab works with. Nothing in it is one browser's."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from molora.errors import MoLoRAError
from molora.selection import Choice
from molora.stack import StackLayer
from molora_demo.lessons import Lessons
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
        lessons: what browsers have taught; None: nothing can be taught here.
    """

    source: Source
    palette: Palette
    lessons: Lessons | None = None
    running: Running = field(default_factory=Running)
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tally", Tally(self.palette, self.public))

    def visible(self, key: str, selection: dict[str, Choice]) -> dict[str, Choice]:
        """``selection`` without what other browsers taught.

        Raises:
            MoLoRAError: it names such a thing, or something of the browser's own is damaged.
        """
        return self.lessons.visible(key, selection) if self.lessons is not None else selection

    def choices(self, key: str, layer: StackLayer) -> list[tuple[str, str]]:
        """(shown, meant) of the adapters that the browser may name."""
        if self.lessons is not None:
            return self.lessons.choices(key, layer)
        return [(name, name) for name in self.public(layer)]

    def public(self, layer: StackLayer) -> list[str]:
        """The adapters that are everybody's."""
        return self.lessons.private.public(layer) if self.lessons is not None else list(layer.adapters)

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

        titles = self.lessons.titles(key) if self.lessons is not None else {}

        self._bring_in()
        grown = None
        for grown in answer(ask, stop, titles):
            yield grown
        if grown is not None and grown.tokens:
            self.tally.add(grown.tokens, grown.stats)

    def _bring_in(self) -> None:
        """What was promoted since the last answer serves from here on."""
        try:
            if changed := self.source.catch_up():
                gr.Info(escape(f"New: {', '.join(changed)}"))
        except MoLoRAError as error:
            if self.source.model is None:  # a server that has gone has no answer either
                raise
            gr.Warning(escape(f"What served goes on serving: {error}"))


def explain(text: str) -> None:
    """What a tab shows, in words for everybody."""
    with gr.Accordion("What am I looking at?", open=False, elem_classes="explain"):
        gr.Markdown(text)
