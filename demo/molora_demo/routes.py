"""The "Routes" tab: a text coloured by the adapters that act on it, its losses, and the router's choice at a token."""

import secrets
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from molora.errors import MoLoRAError
from molora.selection import Choice
from molora.stack import AUTO, NONE, StackLayer
from molora_demo.controls import is_decided, title
from molora_demo.measured import Reading, csv_text, measure
from molora_demo.page import QUIET, explain
from molora_demo.picture import Piece, draw
from molora_demo.render import Palette, escape, shares, speaker
from molora_demo.route_view import CONVENTION, EMPTY, HINT, detail_html, facts, palette_for, reading_html

EXAMPLES = (
    (
        "Medicine and code",
        "A child of 20 kg with a fever needs 15 mg of paracetamol per kg, at most four times a day.\n\n"
        "def dose(weight_kg, mg_per_kg=15):\n    return weight_kg * mg_per_kg\n",
    ),
    (
        "Law and sums",
        "The tenant shall pay the rent on the first day of each month. If it is not paid within ten days, the landlord "
        "may end the lease by written notice.\n\nThe rent is $800, so a year costs 12 * 800 = 9600 dollars.",
    ),
    ("Two languages", "The weather is fine today. Сьогодні в Києві сонячно, а завтра буде дощ."),
)
ABOUT = """
A language model reads a text in small pieces, called tokens: a word, a part of a word or a sign. Before each one it
guesses what comes next.

Small add-ons, called adapters, change its guesses: one is good at law, another at code. A router picks one for
every token, and the colour shows which.

The loss says how surprised the model was by the token that really came: 0 is no surprise, 0.7 is one chance in two,
4.6 is one in a hundred. It is measured twice, with the adapters and by the base model alone; the lower one guessed
better.

A better guess does not make a text true. The numbers only tell how well the model saw it coming.
"""
Visible = Callable[[str, dict[str, Choice]], dict[str, Choice]]
"""(a browser's key, a selection) -> the selection without what is other browsers' alone."""
CSV, PNG = "molora-routes.csv", "molora-routes.png"


class Handlers:
    """What happens on a click. What a person wrote is kept by Gradio for each browser apart, and not here."""

    def __init__(self, model: Any, palette: Palette, visible: Visible = lambda key, selection: selection) -> None:
        self._model = model
        self._palette = palette
        self._visible = visible
        self._told = [layer.name for layer in told_layers(model)]

    def show(self, key: str, text: str, layer: str, *names: str) -> tuple[str, str, Reading | None, None]:
        """(view, detail, what was measured, the picked token) of a text, for the browser that has ``key``."""
        has_router = self._model.router is not None
        selection: dict[str, Choice] = {
            own.name: AUTO if is_decided(own, has_router) else None for own in self._model.stack.layers
        }
        selection |= {own: None if name == NONE else name for own, name in zip(self._told, names, strict=True)}
        try:
            reading = measure(self._model, text or "", self._visible(key, selection))
        except MoLoRAError as error:
            gr.Warning(escape(str(error)))
            return EMPTY, "", None, None
        return self._view(reading, layer, None), HINT, reading, None

    def recolour(self, layer: str, reading: Reading | None, picked: int | None) -> str:
        """The view of the same numbers by another layer."""
        return EMPTY if reading is None else self._view(reading, layer, picked)

    def pick(self, event: gr.EventData, reading: Reading | None) -> tuple[str, int | None]:
        """One token in full; the page says which, and what it says is checked."""
        data = event._data
        place = data.get("index") if isinstance(data, dict) else None
        if reading is None or not isinstance(place, int) or not 0 <= place < len(reading.tokens):
            return "", None
        return f'<div class="one">{detail_html(reading, place, self._palette)}</div>', place

    def files(
        self, layer: str, reading: Reading | None, folder: TemporaryDirectory[str] | None
    ) -> tuple[Any, Any, TemporaryDirectory[str] | None]:
        """The two downloads, in a folder that is this browser's and takes the place of the last one."""
        remove(folder)
        if reading is None:
            return gr.update(value=None, interactive=False), gr.update(value=None, interactive=False), None
        # In Gradio's own folder for files, which it serves without a copy that would stay behind.
        cache = Path(get_upload_folder())
        cache.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=secrets.token_hex(16), dir=cache, ignore_cleanup_errors=True)
        table, picture = Path(folder.name, CSV), Path(folder.name, PNG)
        table.write_text(csv_text(reading), encoding="utf-8-sig", newline="")  # Excel knows UTF-8 by its mark
        self._picture(reading, layer).save(picture)
        return gr.update(value=str(table), interactive=True), gr.update(value=str(picture), interactive=True), folder

    def _picture(self, reading: Reading, name: str) -> Any:
        colours = self._colours(name)
        layer = colours.speaking.name

        def fill(adapter: str | None) -> int | None:
            return int(colours.css_class(layer, adapter).removeprefix("fill-")) if adapter else None

        pieces = [
            Piece(token.text, fill(speaker(token.route, layer)), token.routed, token.base) for token in reading.tokens
        ]
        legend = [
            (f"{adapter or f'no {layer} adapter'} {part:.0%}", fill(adapter))
            for adapter, part in shares(reading.predicted, layer)
        ]
        return draw(pieces, legend, f"MoLoRA routes: {layer}", f"{facts(reading)} {CONVENTION}")

    def _view(self, reading: Reading, layer: str, picked: int | None) -> str:
        return reading_html(reading, self._palette, self._colours(layer), picked)

    def _colours(self, name: str) -> Palette:
        found = [layer for layer in self._palette.layers if layer.name == name]
        return palette_for(self._palette, (found or [self._palette.speaking])[0])


def remove(folder: TemporaryDirectory[str] | None) -> None:
    """Deletes what a browser could download."""
    if folder is not None:
        folder.cleanup()


def told_layers(model: Any) -> list[StackLayer]:
    """The layers with adapters that nothing decides by default, so that a person does."""
    filled = [layer for layer in model.stack.layers if layer.adapters]
    return [layer for layer in filled if not is_decided(layer, model.router is not None)]


def build(model: Any, palette: Palette, key: Any = None, visible: Visible = lambda key, selection: selection) -> None:
    """The tab for ``model``, within an open ``gr.Tab``.

    Args:
        model: a `MoLoRAModel`; until a text is shown only its ``stack`` and ``router`` are asked.
        palette: of the chat, so that an adapter has one colour in all tabs.
        key: the component that holds a browser's key, None where there is none.
        visible: what of a selection the browser with this key may use.
    """
    handlers = Handlers(model, palette, visible)
    key = gr.State("") if key is None else key
    reading, picked = gr.State(None), gr.State(None)
    folder = gr.State(None, delete_callback=remove)
    with gr.Column(elem_classes="routes"):
        explain(ABOUT)
        box = gr.Textbox(label="Text", placeholder="Paste a text", lines=4, max_lines=12)
        with gr.Row(elem_classes="examples"):
            examples = [gr.Button(name, size="sm", min_width=0) for name, _ in EXAMPLES]
        layers = [layer.name for layer in palette.layers if layer.adapters] or [palette.speaking.name]
        with gr.Row(equal_height=True):
            colour = gr.Radio(layers, value=layers[0], label="Colour by", visible=len(layers) > 1, scale=1)
            named = [_named(layer) for layer in told_layers(model)]
        show = gr.Button("Show routes", variant="primary")
        view = gr.HTML(EMPTY, elem_id="reading", js_on_load=Path(__file__).with_name("routes.js").read_text("utf-8"))
        detail = gr.HTML("", elem_id="detail", js_on_load="element.setAttribute('aria-live', 'polite')")
        with gr.Row():
            table = gr.DownloadButton("Download CSV", size="md", interactive=False)
            picture = gr.DownloadButton("Download PNG", size="md", interactive=False)
    forward: dict[str, Any] = {
        "concurrency_id": "generate", "concurrency_limit": 1, "show_progress": "minimal", "show_progress_on": [view]
    }  # fmt: skip
    asking = ([key, box, colour, *named], [view, detail, reading, picked])
    saving = ([colour, reading, folder], [table, picture, folder])
    drawing: dict[str, Any] = {**QUIET, "concurrency_id": "route_files", "concurrency_limit": 1}
    for place, (button, text) in enumerate([(show, None), *zip(examples, (text for _, text in EXAMPLES), strict=True)]):
        event: Any = button
        if text is not None:
            event = button.click(lambda text=text: text, None, box, queue=False, **QUIET)
        name = {"api_name": "routes"} if place == 0 else {"api_visibility": "private"}
        event = (event.click if text is None else event.then)(handlers.show, *asking, **forward, **name)
        event.then(handlers.files, *saving, **drawing)
    event = colour.input(
        handlers.recolour, [colour, reading, picked], view, queue=False, show_progress="hidden", api_name="routes_by"
    )
    event.then(handlers.files, *saving, **drawing)
    view.select(handlers.pick, reading, [detail, picked], queue=False, trigger_mode="always_last", **QUIET)


def _named(layer: StackLayer) -> gr.Dropdown:
    """One adapter, or none, for the whole text."""
    forced = layer.default if layer.default in layer.adapters else NONE
    return gr.Dropdown([NONE, *layer.adapters], value=forced, label=title(layer), info="for the whole text")
