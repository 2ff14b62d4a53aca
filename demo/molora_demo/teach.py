"""The Teach tab: what a person can teach the demo, and what that person has taught."""

from typing import Any

import gradio as gr
from gradio.context import Context

from molora.stack import AUTO
from molora_demo.lesson_words import WHAT, closed_html, note_html
from molora_demo.lessons import Lessons
from molora_demo.render import escape
from molora_demo.teach_handlers import EVERYTHING, Handlers

MY_CHATS = "My chats"
WAITING = "Waiting for its turn …"
WAYS = {"By a profile of it": "profile", "By pieces of other people's adapters": "pieces"}
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(lessons: Lessons, key: Any, turns: gr.State) -> gr.State:
    """The tab, inside an open `gr.Tab`.

    Args:
        lessons: what it works on.
        key: a component that holds the browser's key, a secret of 16 characters or more.
        turns: a state that holds the chat: objects with ``prompt`` and ``answer``.

    Returns:
        A counter: when it changes, so has what the browser may select.
    """
    handlers = Handlers(lessons)
    layers = [layer.name for layer in lessons.model.stack.layers]
    changed = gr.State(0)
    gr.HTML(
        "<h2>Teach it something</h2><p>What you teach is yours alone: other people's answers never use it.</p>",
        elem_classes="teach-head",
    )
    with gr.Accordion("What am I looking at?", open=False, elem_classes="teach-what"):
        gr.HTML(WHAT)
    with gr.Row(elem_classes="teach-ways", equal_height=False):
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_classes="teach-card"):
                chat = _chat(lessons)
            news = gr.HTML("", elem_id="teach-news")
            gr.HTML("<h2>What you have taught</h2>", elem_classes="teach-head")
            table = gr.HTML("", elem_classes="teach-table")
            picked = gr.Dropdown([], label="Which one", interactive=False)
            with gr.Row(elem_classes="teach-tools"):
                back = gr.Button("Roll back", interactive=False, min_width=110)
                forget = gr.Button("Forget", interactive=False, min_width=110)
                everything = gr.Button("Forget everything", interactive=False, min_width=170)
            meant = gr.State("")  # what is to be forgotten: a label, or everything
            with gr.Row(elem_classes="teach-sure", visible=False) as sure:
                question = gr.HTML("")
                yes = gr.Button("Yes, delete it", variant="stop", min_width=160, scale=0)
                no = gr.Button("Keep it", min_width=110, scale=0)
        with gr.Column(scale=2, min_width=300):
            uploads = _upload(lessons, layers)
            document = _document(lessons, layers)
            described = _description(lessons, layers)
            history = _history(lessons)

    _connect_chat(handlers, chat, [key, chat[0], turns, changed], news, changed)
    # In the chat's queue stands what the live base has to read for; what only checks and writes files has its own.
    apart: dict[str, Any] = {"concurrency_id": "teach-files", "concurrency_limit": 1, "api_visibility": "undocumented"}
    turn: dict[str, Any] = {**apart, "concurrency_id": "generate"}
    for button, act, inputs, outputs, how in (
        (uploads[-1], handlers.bring, uploads[:-1], [uploads[2]], apart),
        (document[-1], handlers.document, document[:-1], [document[2]], turn),
        (described[-1], handlers.describe, described[:-1], [], apart),
        (history[-1], handlers.history, history[:-1], [history[1]], turn),
        (back, handlers.rollback, [picked], [], apart),
        (yes, handlers.forget, [meant], [], turn),
    ):
        waiting = button.click(lambda: note_html(WAITING), None, news, queue=False, **_QUIET)
        waiting.then(act, [key, *inputs, changed], [news, changed, *outputs], show_progress="hidden", **how)
    asked: list[Any] = [sure, question, meant]
    forget.click(handlers.sure, [key, picked], asked, queue=False, **_QUIET)
    everything.click(lambda: handlers.sure("", EVERYTHING), None, asked, queue=False, **_QUIET)
    for button in (yes, no):
        button.click(lambda: gr.update(visible=False), None, sure, queue=False, **_QUIET)
    # When the page opens, when the key comes, and when something has changed.
    page: Any = Context.root_block
    gr.on(
        [page.load, key.change, changed.change],
        handlers.refresh,
        [key, picked],
        [table, picked, back, forget, everything],
        queue=False,
        **_QUIET,
    )
    return changed


def _connect_chat(handlers: Handlers, chat: list[Any], inputs: list[Any], news: Any, changed: Any) -> None:
    """Learning has a queue of its own: the model that serves is left alone, so the chat goes on meanwhile."""
    _, start, stop = chat

    def busy() -> tuple[Any, Any, str]:
        return gr.update(interactive=False), gr.update(interactive=True), note_html(WAITING)

    def idle() -> tuple[Any, Any]:
        return gr.update(interactive=True), gr.update(interactive=False)

    waiting = start.click(busy, None, [start, stop, news], queue=False, **_QUIET)
    learning = waiting.then(
        handlers.remember, inputs, [news, changed], concurrency_id="teach", concurrency_limit=1,
        show_progress="hidden", api_visibility="undocumented", api_name="remember",
    )  # fmt: skip
    learning.then(idle, None, [start, stop], **_QUIET)
    stop.click(handlers.stop, None, [news, start, stop], cancels=[learning], queue=False, **_QUIET)


def _chat(lessons: Lessons) -> list[Any]:
    """[title, start, stop]"""
    gr.HTML(
        "<h3>Remember this chat</h3><p>It learns what you said of yourself in the Chat tab, in sentences such as “My "
        "dog is called Biscuit”. On a machine without a GPU that takes some minutes.</p>"
    )
    why = lessons.unready("chat")
    if why:
        gr.HTML(closed_html(why))
    title = gr.Textbox(MY_CHATS, label="Name", info="The same name again: it learns on.", max_length=40)
    with gr.Row():
        start = gr.Button("Remember this chat", variant="primary", interactive=not why, min_width=150)
        stop = gr.Button("Stop", variant="stop", interactive=False, min_width=84)
    return [title, start, stop]


def _upload(lessons: Lessons, layers: list[str]) -> list[Any]:
    """[layer, title, files, go]"""
    with gr.Accordion("Bring an adapter", open=False):
        gr.HTML(
            "<p>The two files of a PEFT LoRA folder: adapter_config.json and adapter_model.safetensors, made for "
            "this base model.</p>"
        )
        files = gr.File(label="Two files", file_count="multiple", file_types=[".json", ".safetensors"], height=120)
        layer, title = gr.Dropdown(layers, value=layers[-1], label="Layer"), _name("My adapter")
        return [layer, title, files, gr.Button("Bring it")]


def _document(lessons: Lessons, layers: list[str]) -> list[Any]:
    """[layer, title, file, go]"""
    with gr.Accordion("Drop a document", open=False):
        on = _open(
            lessons, "document",
            "Text, Markdown, HTML or PDF; it is read once and then deleted here. The network that is shipped "
            "answers a third of the questions about plain facts in a text; to the others it says something likely that "
            "is wrong.",
        )  # fmt: skip
        file = gr.File(
            label="Document", file_types=[".txt", ".md", ".markdown", ".html", ".htm", ".pdf"], height=120,
            visible=on,
        )  # fmt: skip
        routed = [one.name for one in lessons.model.stack.layers if one.default == AUTO] or layers
        layer = gr.Dropdown(layers, value=routed[0], label="Layer", visible=on)
        return [layer, _name("My document", on), file, gr.Button("Read it", interactive=on)]


def _description(lessons: Lessons, layers: list[str]) -> list[Any]:
    """[layer, title, text, go]"""
    with gr.Accordion("Describe a personality", open=False):
        on = _open(lessons, "description", "Say in a sentence what it should be like.")
        text = gr.Textbox(label="Description", placeholder="answers like a pirate", visible=on, max_length=500)
        first = "personality" if "personality" in layers else layers[0]
        layer = gr.Dropdown(layers, value=first, label="Layer", visible=on)
        return [layer, _name("My personality", on), text, gr.Button("Make it", interactive=on)]


def _history(lessons: Lessons) -> list[Any]:
    """[title, file, way, go]"""
    with gr.Accordion("Give a history", open=False):
        open_ways = [(text, way) for text, way in WAYS.items() if not lessons.unready(way)]
        gr.HTML(
            "<p>What a person asked and was answered: JSON Lines, a <code>&#123;&quot;messages&quot;: "
            "[…]&#125;</code> a line.</p>"
        )
        for way in WAYS.values():
            if why := lessons.unready(way):
                gr.HTML(closed_html(why))
        on = bool(open_ways)
        file = gr.File(label="History", file_types=[".jsonl", ".json"], height=120, visible=on)
        choice = gr.Radio(
            open_ways or list(WAYS.items()), value=open_ways[0][1] if on else None, label="How", visible=on
        )
        title = gr.Textbox(label="Whose", info="The user's name, as the file has it.", max_length=40, visible=on)
        return [title, file, choice, gr.Button("Make it", interactive=on)]


def _open(lessons: Lessons, way: str, about: str) -> bool:
    gr.HTML(f"<p>{escape(about)}</p>")
    if why := lessons.unready(way):
        gr.HTML(closed_html(why))
    return not why


def _name(value: str, visible: bool = True) -> gr.Textbox:
    return gr.Textbox(value, label="Name", max_length=40, visible=visible)
