"""The same question side by side: the base alone, one adapter, several at once, and the router's choice."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from molora.errors import MoLoRAError
from molora.selection import Choice
from molora.stack import AUTO
from molora_demo.page import QUIET, Page, explain
from molora_demo.render import answer_html, escape, failed_html, waiting_html
from molora_demo.source import Settings

EXAMPLE = "A recipe for 4 people needs 300 g of rice. How much for 10 people, and how is that written in Python?"
TITLES = ("Base alone", "One adapter", "Merged", "Routed")
EXPLAINED = """\
The same question is answered four times, one after another. **Base alone** is the language model without any
adapter. **One adapter** has the one that you name acting on every word. **Merged** has all that you name acting on
every word at once, each with an equal part: what one gets who melts adapters into one. **Routed** lets the router
decide for each word.

The answers are the likeliest ones, without chance, so that what differs comes from the adapters alone."""


def build(page: Page, key: Any) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The tab; returns the two controls that name adapters, so that the page can offer new ones."""
    layer = page.palette.speaking
    names = list(layer.adapters)
    with gr.Row(elem_classes="ask", equal_height=True):
        box = gr.Textbox(
            EXAMPLE, label="Question", container=False, show_label=False, scale=8, min_width=240, max_lines=4
        )
        send = gr.Button("Compare", variant="primary", size="md", scale=0, min_width=110)
        stop = gr.Button("Stop", variant="stop", size="md", scale=0, min_width=84, interactive=False)
    with gr.Row(equal_height=True):
        one = gr.Dropdown(names, value=names[0] if names else None, label="One adapter", min_width=200)
        merged = gr.Dropdown(names, value=names, multiselect=True, label="Merged of", min_width=280, scale=2)
        new_tokens = gr.Slider(16, 512, value=96, step=16, label="Most new tokens", min_width=200, buttons=[])
    with gr.Row(elem_classes="compare", equal_height=False):
        panes = []
        for title in TITLES:
            with gr.Column(min_width=260):
                gr.HTML(f"<h2>{title}</h2>")
                panes.append(gr.HTML(waiting_html()))
    explain(EXPLAINED)

    def compare(
        request: gr.Request, prompt: str, key: str, one: str | None, merged: Sequence[str], most: int
    ) -> Iterator[list[str]]:
        prompt = prompt.strip()
        if not prompt:
            gr.Warning("Write a question first.")
            return
        session = f"compare {request.session_hash}"
        stop, shown = page.running.start(session), [waiting_html()] * len(TITLES)
        try:
            for place, selection in enumerate(_selections(page, one, merged)):
                if selection is None or stop.is_set():
                    shown[place] = waiting_html("Nothing is chosen." if selection is None else "Stopped.")
                    continue
                try:
                    for now in page.answer(key, [], prompt, selection, Settings(int(most), 0.0), stop):
                        shown[place] = answer_html(now.tokens, now.stats, page.palette)
                        yield list(shown)
                except MoLoRAError as error:
                    gr.Warning(escape(str(error)))
                    shown[place] = failed_html("", str(error))
                yield list(shown)
        finally:
            page.running.finish(session)

    def end(request: gr.Request) -> None:
        page.running.stop(f"compare {request.session_hash}")

    def switch(busy: bool) -> list[Any]:
        return [gr.update(interactive=not busy), gr.update(interactive=busy)]

    gr.on([send.click, box.submit], lambda: switch(True), None, [send, stop], queue=False, **QUIET)
    gr.on(
        [send.click, box.submit],
        compare,
        [box, key, one, merged, new_tokens],
        panes,
        **{**page.generate, "show_progress_on": panes[:1]},
        api_name="compare",
    ).then(lambda: switch(False), None, [send, stop], **QUIET)
    stop.click(end, None, None, queue=False, api_name="stop_compare")
    return one, merged


def _selections(page: Page, one: str | None, merged: Sequence[str]) -> list[dict[str, Choice] | None]:
    """Of the four panes; None: nothing was chosen for it. The other layers are off in all of them."""
    layer = page.palette.speaking
    off: dict[str, Choice] = {other.name: None for other in page.source.layers}
    routed: Choice = AUTO if page.source.has_router or layer.keyed else None
    return [
        off,
        off | {layer.name: one} if one else None,
        off | {layer.name: {name: 1 / len(merged) for name in merged}} if merged else None,
        off | {layer.name: routed} if routed else None,
    ]
