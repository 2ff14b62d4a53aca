"""The demo's page: a chat, one control for each stack layer, and the wiring between them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import molora_demo
from molora.chat import render
from molora.errors import MoLoRAError
from molora.stack import AUTO, NONE, StackLayer
from molora_demo.render import (
    Palette,
    conversation_html,
    escape,
    failed_html,
    legend_html,
    running_html,
    turn_html,
)
from molora_demo.session import Running, Settings, Turn, answer, choice, fitting_messages, settle

EXAMPLES = (
    "A train travels 180 km in 3 hours. How far does it go in 5 hours?",
    "Write a Python function that reverses a list.",
    "What are the early symptoms of type 2 diabetes?",
    "Can a landlord keep the deposit after the lease ends?",
    "A child of 20 kg needs 15 mg of paracetamol per kg. What is the dose, and how is it computed in Python?",
)
FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
TAGLINE = "One frozen model, many small adapters, and a router that decides for every token which of them speaks."
STOPPED = "stopped"


class Handlers:
    """What happens on a click. Gradio keeps the turns of each browser apart; this holds nothing of a conversation."""

    def __init__(self, model: Any, palette: Palette, catch_up: Callable[[], list[str]]) -> None:
        self._model = model
        self._palette = palette
        self._catch_up = catch_up
        self._running = Running()

    def ask(
        self, request: gr.Request, prompt: str, turns: list[Turn], new_tokens: int, temperature: float, *choices: Any
    ) -> Iterator[tuple[str, list[Turn], str]]:
        """Streams (conversation, turns, text left in the box)."""
        prompt = prompt.strip()
        if not prompt:
            yield _conversation(turns), turns, ""
            return
        yield _conversation(turns, running_html(prompt, [], self._palette)), turns, ""
        session = str(request.session_hash)
        stop = self._running.start(session)
        settings = Settings(int(new_tokens), float(temperature))
        names = [layer.name for layer in self._model.stack.layers]
        selection = {name: choice(value) for name, value in zip(names, choices, strict=True)}
        try:
            self._bring_in()
            room = self._model.config.max_position_embeddings - settings.max_new_tokens
            messages = fitting_messages(turns, prompt, room, self._count)
            for now in answer(self._model, messages, selection, settings, stop):
                yield _conversation(turns, running_html(prompt, now.tokens, self._palette)), turns, ""
            note = STOPPED if stop.is_set() else ""
            turns = [*turns, Turn(prompt, now.text, turn_html(prompt, now.tokens, now.stats, self._palette, note))]
            yield _conversation(turns), turns, ""
        except MoLoRAError as error:
            gr.Warning(escape(str(error)))
            yield _conversation(turns, failed_html(prompt, str(error))), turns, prompt
        finally:
            self._running.finish(session)

    def retry(
        self, request: gr.Request, draft: str, turns: list[Turn], new_tokens: int, temperature: float, *choices: Any
    ) -> Iterator[tuple[str, list[Turn], str]]:
        """Answers the last prompt anew; what is typed in the box stays there."""
        if not turns:
            yield _conversation(turns), turns, draft
            return
        for view, kept, _ in self.ask(request, turns[-1].prompt, turns[:-1], new_tokens, temperature, *choices):
            yield view, kept, draft

    def stop(self, request: gr.Request) -> None:
        """Ends the answer of this browser, if one is being written."""
        self._running.stop(str(request.session_hash))

    def _bring_in(self) -> None:
        """What was promoted since the last turn serves from here on."""
        try:
            if changed := self._catch_up():
                gr.Info(escape(f"New: {', '.join(changed)}"))
        except MoLoRAError as error:
            gr.Warning(escape(f"What served goes on serving: {error}"))

    def _count(self, messages: list[dict[str, str]]) -> int:
        text = render(self._model.tokenizer, messages, add_generation_prompt=True)
        return len(self._model.tokenizer(text, add_special_tokens=False).input_ids)


def _conversation(turns: Sequence[Turn], last: str = "") -> str:
    return conversation_html([*(turn.html for turn in turns), *filter(None, [last])], busy=bool(last))


def build(model: Any, catch_up: Callable[[], list[str]] = list) -> gr.Blocks:
    """The page for ``model``, a `MoLoRAModel`. Start it with `serve`, which brings its style.

    Args:
        model: of it are needed ``stack``, ``router`` (whether there is one), ``stream``, ``tokenizer`` and ``config``.
        catch_up: called before each answer, brings in what is new and names it.
    """
    palette = Palette(model.stack.layers)
    handlers = Handlers(model, palette, catch_up)
    with gr.Blocks(title="MoLoRA", analytics_enabled=False, fill_width=True) as page:
        turns = gr.State([])
        gr.HTML(f"<header><h1>MoLoRA</h1><p>{TAGLINE}</p></header>", elem_id="heading")
        with gr.Row(elem_classes="columns", equal_height=False):
            with gr.Column(scale=3, min_width=420, elem_classes="main"):
                view = gr.HTML(conversation_html([]), elem_id="conversation")
                with gr.Row(elem_classes="examples"):
                    examples = [gr.Button(text, size="sm", min_width=0) for text in EXAMPLES]
                with gr.Row(elem_classes="ask", equal_height=True):
                    box = gr.Textbox(
                        placeholder="Write a message", label="Message", container=False, show_label=False, scale=8
                    )
                    send = gr.Button("Send", variant="primary", size="md", scale=0, min_width=84)
                    stop = gr.Button("Stop", variant="stop", size="md", scale=0, min_width=84, interactive=False)
                    retry = gr.Button("Retry", size="md", scale=0, min_width=84, interactive=False)
                    clear = gr.Button("Clear", size="md", scale=0, min_width=84, interactive=False)
            with gr.Column(scale=1, min_width=280, elem_classes="side"):
                controls = [_control(layer, model.router is not None) for layer in model.stack.layers]
                gr.HTML(legend_html(palette), elem_id="legend")
                with gr.Accordion("Settings", open=False):
                    new_tokens = gr.Slider(16, 1024, value=256, step=16, label="Most new tokens")
                    temperature = gr.Slider(
                        0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest token"
                    )
        _connect(
            handlers,
            outputs=[view, turns, box],
            knobs=[turns, new_tokens, temperature, *controls],
            asking=[([send.click, box.submit], box), *(([button.click], button) for button in examples)],
            buttons=[send, stop, retry, clear, *examples],
        )
    return page


def _control(layer: StackLayer, has_router: bool) -> gr.Dropdown:
    """A layer that the router or keys decide by default takes "auto" or several names; any other one name or none."""
    title = layer.name.replace("_", " ").capitalize()
    off = ("none", NONE)
    if layer.default != AUTO or not (has_router or layer.keyed):
        forced = layer.default if layer.default in layer.adapters else NONE
        return gr.Dropdown([off, *layer.adapters], value=forced, label=title)
    picks = "the question picks one for the answer" if layer.keyed else "the router picks for every token"
    control = gr.Dropdown(
        [("auto", AUTO), off, *layer.adapters],
        value=[AUTO],
        multiselect=True,
        label=title,
        info=f"auto: {picks}. Several names: it picks among these.",
    )
    control.input(settle, control, control, queue=False, show_progress="hidden", api_visibility="private")
    return control


def _connect(
    handlers: Handlers,
    outputs: list[Any],
    knobs: list[Any],
    asking: list[tuple[list[Callable], Any]],
    buttons: list[gr.Button],
) -> None:
    """Wires the buttons: one generation at a time over all browsers, the others wait in Gradio's queue."""
    view, turns, box = outputs
    send, stop, retry, clear, *examples = buttons

    def busy() -> list[Any]:
        return [gr.update(interactive=button is stop) for button in buttons]

    def idle(turns: list[Turn]) -> list[Any]:
        usable = {id(send): True, id(stop): False} | {id(button): True for button in examples}
        return [gr.update(interactive=usable.get(id(button), bool(turns))) for button in buttons]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    generate: dict[str, Any] = {
        "concurrency_limit": 1,
        "concurrency_id": "generate",
        "show_progress": "minimal",
        "show_progress_on": [view],
    }
    for place, (triggers, prompt) in enumerate(asking):
        gr.on(triggers, busy, None, buttons, queue=False, **quiet)
        name = {"api_name": "ask"} if place == 0 else {"api_visibility": "private"}
        event = gr.on(triggers, handlers.ask, [prompt, *knobs], outputs, **generate, **name)
        event.then(idle, turns, buttons, **quiet)
    gr.on([retry.click], busy, None, buttons, queue=False, **quiet)
    event = retry.click(handlers.retry, [box, *knobs], outputs, **generate, api_name="retry")
    event.then(idle, turns, buttons, **quiet)
    stop.click(handlers.stop, None, None, queue=False, api_name="stop")
    clear.click(lambda: (conversation_html([]), []), None, [view, turns], queue=False, api_name="clear").then(
        idle, turns, buttons, **quiet
    )


def serve(
    page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True, block: bool = True
) -> str:
    """Serves ``page`` and returns its address; with ``block`` only when it ends.

    Raises:
        MoLoRAError: the port is taken.
    """
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="zinc", radius_size="lg", font=FONT, font_mono=MONO)
    # The theme's own hints are too faint to read: a contrast of 4.5 or more for each.
    theme.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    try:
        _, address, _ = page.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            theme=theme,
            css_paths=Path(molora_demo.__file__).with_name("style.css"),
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise MoLoRAError(f"Port {port} of {host} cannot be used. Give another one with --port.") from error
    if block:
        page.block_thread()
    return address


def launch(model_folder: str | Path, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True) -> None:
    """Loads the saved MoLoRA in ``model_folder`` and serves its demo until interrupted; what is promoted there
    meanwhile serves from the next answer on.

    Raises:
        MoLoRAError: the folder holds no usable MoLoRA, or the port is taken.
    """
    import torch  # the page itself needs no model code, and tests give it a stand-in

    from molora import MoLoRAModel
    from molora.following import Following
    from molora.settled import settle

    device_map = "cuda" if torch.cuda.is_available() else None
    model = MoLoRAModel.from_pretrained(model_folder, device_map=device_map)
    page = build(model, Following(model, model_folder).catch_up)
    settle()
    print(f"MoLoRA demo on http://{host}:{port}. Stop it with Ctrl+C.", flush=True)
    serve(page, host, port, open_browser)
