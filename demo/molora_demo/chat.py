"""The chat: an answer streams in the colours of who spoke, and conversations stay in the browser."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from molora.errors import MoLoRAError
from molora_demo import book, controls
from molora_demo.controls import Controls
from molora_demo.page import QUIET, Page, explain
from molora_demo.render import (
    conversation_html,
    escape,
    failed_html,
    legend_html,
    running_html,
    turn_html,
)
from molora_demo.source import Settings, Turn

EXAMPLES = (
    "A train travels 180 km in 3 hours. How far does it go in 5 hours?",
    "Write a Python function that reverses a list.",
    "What are the early symptoms of type 2 diabetes?",
    "Can a landlord keep the deposit after the lease ends?",
    "A child of 20 kg needs 15 mg of paracetamol per kg. What is the dose, and how is it computed in Python?",
)
STOPPED = "stopped"
Shown = tuple[Any, str, Any, Any]
"""(the conversation, the answer that is being written, the turns, the text in the box)"""
EXPLAINED = """\
A small language model answers you. Beside it lie **adapters**: small additions that each know one thing well
(numbers, code, medicine) or give the answer a tone. A **router** looks at every word as it is written and lets the
adapters act that fit. The colour behind a word tells which one that was, an underline tells the tone; rest the
pointer on a word to see it in words. On the right (below, on a phone) you can switch each group of adapters to what
you like, at any time.

The model is very small, so that it runs on any computer: it is often wrong. Your conversations are kept in this
browser and nowhere else."""


class Handlers:
    """What happens on a click. Gradio keeps the turns of each browser apart; this holds nothing of a conversation."""

    def __init__(self, page: Page, picked: Controls) -> None:
        self._page, self._picked = page, picked

    def ask(
        self,
        request: gr.Request,
        prompt: str,
        turns: list[Turn],
        key: str,
        new_tokens: int,
        temperature: float,
        *choices: Any,
    ) -> Iterator[Shown]:
        """Streams what is shown, and what is left in the box. While an answer grows it alone is sent."""
        prompt = prompt.strip()
        if not prompt:
            yield _past(turns), "", turns, ""
            return
        palette = self._page.palette
        yield _past(turns, busy=True), _now(running_html(prompt, [], palette)), turns, ""
        session = str(request.session_hash)
        stop = self._page.running.start(session)
        settings = Settings(int(new_tokens), float(temperature))
        try:
            now = None
            selection = self._picked.selection(choices)
            for now in self._page.answer(key, turns, prompt, selection, settings, stop):
                yield gr.skip(), _now(running_html(prompt, now.tokens, palette)), gr.skip(), gr.skip()
            if now is not None:
                note = STOPPED if stop.is_set() else ""
                turns = [*turns, Turn(prompt, now.text, turn_html(prompt, now.tokens, now.stats, palette, note))]
            yield _past(turns), "", turns, ""
        except MoLoRAError as error:
            gr.Warning(escape(str(error)))
            yield _past(turns, busy=True), _now(failed_html(prompt, str(error)), busy=False), turns, prompt
        finally:
            self._page.running.finish(session)

    def retry(self, request: gr.Request, draft: str, turns: list[Turn], *rest: Any) -> Iterator[Shown]:
        """Answers the last prompt anew; what is typed in the box stays there."""
        if not turns:
            yield _past(turns), "", turns, draft
            return
        for past, now, kept, _ in self.ask(request, turns[-1].prompt, turns[:-1], *rest):
            yield past, now, kept, gr.skip()

    def stop(self, request: gr.Request) -> None:
        """Ends the answer of this browser, if one is being written."""
        self._page.running.stop(str(request.session_hash))


def edit(draft: str, turns: list[Turn]) -> Shown:
    """Takes the last question back into the box, and its answer away."""
    if not turns:
        return _past(turns), "", turns, draft
    return _past(turns[:-1]), "", turns[:-1], turns[-1].prompt


def _past(turns: Sequence[Turn], busy: bool = False) -> str:
    """busy: another turn follows, so that nobody is welcomed."""
    return "" if busy and not turns else conversation_html([turn.html for turn in turns])


def _now(turn: str, busy: bool = True) -> str:
    """A turn that is none of the conversation (yet)."""
    return conversation_html([turn], busy, label="Answer")


@dataclass(frozen=True)
class Chat:
    """What other tabs and the page's start need of this one."""

    controls: Controls
    turns: gr.State
    open: Callable[..., Any]  # (book) -> values of ``opened``
    opened: list[Any]


def build(page: Page, key: Any, kept: Any) -> Chat:
    """The tab.

    Args:
        key: the component with the browser's key.
        kept: the one with its conversations.
    """
    turns, current = gr.State([]), gr.State("")
    with gr.Row(elem_classes="columns", equal_height=False):
        with gr.Column(scale=3, min_width=320, elem_classes="main"):
            with gr.Row(elem_classes="chats", equal_height=True):
                chats = gr.Dropdown(
                    [], label="Conversations", show_label=False, container=False, scale=8, min_width=160
                )
                new = gr.Button("New", size="md", scale=0, min_width=84)
                delete = gr.Button("Delete", size="md", scale=0, min_width=84)
            with gr.Column(elem_id="conversation"), gr.Column(elem_classes="whole"):
                past, now = gr.HTML(_past([]), elem_id="past"), gr.HTML("", elem_id="now")
            with gr.Row(elem_classes="examples"):
                examples = [gr.Button(text, size="sm", min_width=0) for text in EXAMPLES]
            with gr.Row(elem_classes="ask", equal_height=True):
                box = gr.Textbox(
                    placeholder="Write a message",
                    label="Message",
                    container=False,
                    show_label=False,
                    scale=8,
                    min_width=240,
                )
                send = gr.Button("Send", variant="primary", size="md", scale=0, min_width=84)
                stop = gr.Button("Stop", variant="stop", size="md", scale=0, min_width=84, interactive=False)
                retry = gr.Button("Retry", size="md", scale=0, min_width=84, interactive=False)
                again = gr.Button("Edit", size="md", scale=0, min_width=84, interactive=False)
        with gr.Column(scale=1, min_width=280, elem_classes="side"):
            picked = controls.build(page.source.layers, page.source.has_router)
            gr.HTML(legend_html(page.palette), elem_id="legend")
            with gr.Accordion("Settings", open=False):
                new_tokens = gr.Slider(16, 1024, value=256, step=16, label="Most new tokens", buttons=[])
                temperature = gr.Slider(
                    0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest token", buttons=[]
                )
            explain(EXPLAINED)
    handlers = Handlers(page, picked)
    shown, buttons = [past, now, turns, box], [send, stop, retry, again, new, delete, *examples]
    idle_when = {id(retry): bool, id(again): bool, id(delete): bool, id(stop): lambda turns: False}

    def busy() -> list[Any]:
        return [gr.update(interactive=button is stop) for button in buttons]

    def idle(turns: list[Turn]) -> list[Any]:
        return [gr.update(interactive=idle_when.get(id(button), lambda turns: True)(turns)) for button in buttons]

    def save(kept: Any, current: str, turns: list[Turn]) -> tuple[Any, Any]:
        kept = book.saved(kept, current, turns)
        return kept, gr.update(choices=book.listed(kept, current), value=current)

    def show(kept: Any, chat: str | None) -> tuple[Any, ...]:
        chat = chat or book.new_id()
        turns = book.opened(kept, chat)
        return gr.update(choices=book.listed(kept, chat), value=chat), chat, turns, _past(turns), ""

    def begin(kept: Any) -> tuple[Any, ...]:
        return show(kept, None)

    def remove(kept: Any, current: str) -> tuple[Any, ...]:
        kept = book.saved(kept, current, [])
        return kept, *show(kept, None)

    def open_last(kept: Any) -> tuple[Any, ...]:
        known = book.checked(kept)
        return show(known, known[0]["id"] if known else None)

    opened = [chats, current, turns, past, now]
    knobs = [turns, key, new_tokens, temperature, *picked.inputs]
    generate = {**page.generate, "show_progress_on": [now]}

    def answers(triggers: list[Any], work: Callable[..., Any], first: Any, name: dict[str, str]) -> None:
        gr.on(triggers, busy, None, buttons, queue=False, **QUIET)
        gr.on(triggers, work, [first, *knobs], shown, **generate, **name).then(idle, turns, buttons, **QUIET).then(
            save, [kept, current, turns], [kept, chats], **QUIET
        )

    answers([send.click, box.submit], handlers.ask, box, {"api_name": "ask"})
    for button in examples:
        answers([button.click], handlers.ask, button, {"api_visibility": "private"})
    answers([retry.click], handlers.retry, box, {"api_name": "retry"})
    stop.click(handlers.stop, None, None, queue=False, api_name="stop")
    again.click(edit, [box, turns], shown, queue=False, api_name="edit").then(idle, turns, buttons, **QUIET).then(
        save, [kept, current, turns], [kept, chats], **QUIET
    )
    new.click(begin, kept, opened, queue=False, api_name="new").then(idle, turns, buttons, **QUIET)
    delete.click(remove, [kept, current], [kept, *opened], queue=False, api_name="delete").then(
        idle, turns, buttons, **QUIET
    )
    chats.input(show, [kept, chats], opened, queue=False, **QUIET).then(idle, turns, buttons, **QUIET)
    return Chat(picked, turns, open_last, opened)
