"""The demo's page: its tabs, its look, and the server behind it."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

import molora_demo
from molora.errors import MoLoRAError
from molora_demo import chat, compare, controls, monitor, routes, teach
from molora_demo.controls import Controls
from molora_demo.lessons import Lessons
from molora_demo.page import QUIET, Page
from molora_demo.render import Palette
from molora_demo.source import LocalSource, Source

FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
TAGLINE = "One frozen model, many small adapters, and a router that decides for every token which of them speaks."
STORED = "molora"  # what the browser's storage is marked with: it is read again after a restart, so it is no secret


def build(source: Source, lessons: Lessons | None = None) -> gr.Blocks:
    """The page over ``source``. Start it with `serve`, which brings its style.

    Args:
        lessons: what browsers teach the source's model; None: nothing can be taught.
    """
    page = Page(source, Palette(source.layers), lessons)
    secret = lessons.secret() if lessons is not None else STORED
    with gr.Blocks(title="MoLoRA", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        key = gr.BrowserState("", storage_key=f"{STORED}-key", secret=secret)
        kept = gr.BrowserState([], storage_key=f"{STORED}-chats", secret=secret)
        gr.HTML(f"<header><h1>MoLoRA</h1><p>{TAGLINE}</p></header>", elem_id="heading")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat") as tab:
                talk = chat.build(page, key, kept)
            tabs = [tab]
            with gr.Tab("Compare") as tab:
                named = compare.build(page, key)
            tabs.append(tab)
            if source.model is not None:
                with gr.Tab("Routes") as tab:
                    routes.build(source.model, page.palette, key, page.visible)
                tabs.append(tab)
            changed = None
            if lessons is not None:
                with gr.Tab("Teach") as tab:
                    changed = teach.build(lessons, key, talk.turns)
                tabs.append(tab)
            with gr.Tab("Monitor") as tab:
                monitor.build(page, tab, tabs)
        offers = [*talk.controls.names, *named]
        gr.on(
            [blocks.load, *([key.change, changed.change] if changed is not None else [])],
            lambda key, *picked: _offers(page, talk.controls, key, picked),
            [key, *offers],
            offers,
            queue=False,
            **QUIET,
        )
        blocks.load(_known, key, key, **QUIET)
        blocks.load(talk.open, kept, talk.opened, **QUIET)
    return blocks


def _offers(page: Page, picked: Controls, key: str, values: Sequence[Any]) -> list[Any]:
    """What the controls of the chat, and the two of the comparison, offer this browser by now."""
    count = len(picked.layers)
    adapters = [page.choices(key, layer) for layer in picked.layers]
    speaking = page.choices(key, page.palette.speaking)
    there = {meant for _, meant in speaking}
    one, merged = values[count:]
    return [
        *controls.refreshed(picked, adapters, values[:count]),
        gr.update(choices=speaking, value=one if one in there else next(iter(there), None)),
        gr.update(choices=speaking, value=[name for name in merged or [] if name in there]),
    ]


def _known(key: str) -> str:
    """The browser's key: what it is known by, and nobody else has."""
    return key if isinstance(key, str) and len(key) == 32 else secrets.token_hex(16)


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
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
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
            css_paths=sorted(Path(molora_demo.__file__).parent.glob("*.css")),
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise MoLoRAError(f"Port {port} of {host} cannot be used. Give another one with --port.") from error
    if block:
        page.block_thread()
    return address


def launch(
    source: Source,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = True,
    networks: Mapping[str, Path] | None = None,
) -> None:
    """Serves the demo of ``source`` until interrupted; a model of this process can be taught.

    Args:
        networks: what makes adapters at once, as of :class:`~molora_demo.lessons.Lessons`.

    Raises:
        MoLoRAError: the port is taken.
    """
    page = build(source, Lessons(source.model, networks=networks) if source.model is not None else None)
    print(f"MoLoRA demo on http://{host}:{port}. Stop it with Ctrl+C.", flush=True)
    serve(page, host, port, open_browser)


def local(model_folder: str | Path) -> LocalSource:
    """The saved MoLoRA in ``model_folder``, loaded; what is promoted there later serves from the next answer on.

    Raises:
        MoLoRAError: the folder holds no usable MoLoRA.
    """
    import torch  # the page itself needs no model code, and tests give it a stand-in

    from molora import MoLoRAModel
    from molora.following import Following
    from molora.settled import settle

    device_map = "cuda" if torch.cuda.is_available() else None
    model = MoLoRAModel.from_pretrained(model_folder, device_map=device_map)
    catch_up: Callable[[], list[str]] = Following(model, model_folder).catch_up
    settle()
    return LocalSource(model, catch_up)
