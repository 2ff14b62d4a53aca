"""The Teach tab: progress, stop, errors in words, uploads that are not left about, and the page's wiring."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file

from molora.errors import MoLoRAError
from molora_demo import lesson_words, teach_handlers
from molora_demo.lesson_words import coded, progress_html, table_html, told_html
from molora_demo.lessons import Lesson, Lessons, Limits, Told
from molora_demo.teach import build
from molora_demo.teach_handlers import EVERYTHING, Handlers
from tests.conftest import write_adapter
from tests.demo.fake_model import FakeModel
from tests.demo.test_app import free_port
from tests.demo.test_render import HOSTILE
from tests.unit.spoken import make_spoken

KEY = "k" * 32
CHAT = [SimpleNamespace(prompt="My zither is old.", answer="A zither is quiet.")]
FACTS = ("Your name is Ada.", f"Your dog is called {HOSTILE}.")
TOLD = Told("Me", True, "", 2, 4096, 12.0, FACTS, 4, (0.5, 0.9), (0.8, 0.7), 0.03)
BROWSER: Any = SimpleNamespace(session_hash="one")


def lesson(**changed: Any) -> Lesson:
    own = {"layer": "user", "name": "me-0", "title": "Me", "how": "from a chat", "version": 2, "size": 4096}
    return Lesson(
        **{**own, "created": "2026-01-02T03:04:05+00:00", "seconds": 12.0, "folder": Path("nowhere/2"), **changed}
    )


class FakeLessons:
    """What the tab asks of `Lessons`, scripted."""

    def __init__(self) -> None:
        self.model, self.limits = FakeModel(), Limits()
        self.error: Exception | None = None
        self.steps = 3
        self.seen: list[Any] = []

    def remember(self, key: str, title: str, turns: Any, on_step: Any) -> Told:
        for number in range(self.steps):
            on_step(number, self.steps)
            time.sleep(0.02)
        if self.error:
            raise self.error
        return TOLD

    def bring(self, key: str, layer: str, title: str, files: list[Path]) -> Lesson:
        self.seen.append([file.read_text() for file in files])
        if self.error:
            raise self.error
        return lesson(title=title, layer=layer)

    def rollback(self, key: str, layer: str, name: str) -> Lesson:
        return lesson(layer=layer, name=name, version=1)

    def forget(self, key: str, layer: str, name: str) -> Lesson:
        return lesson(layer=layer, name=name)

    def table(self, key: str) -> list[Lesson]:
        if self.error:
            raise self.error
        return [lesson(title=HOSTILE)]

    def used(self, key: str) -> int:
        return 2**20


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLessons:
    monkeypatch.setattr(teach_handlers, "REFRESH_S", 0.01)
    return FakeLessons()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(teach_handlers.gr, "Warning", found.append)
    return found


def test_a_chat_shows_how_far_it_is_and_what_came_of_it(fake: FakeLessons) -> None:
    fake.steps = 30
    pages = list(Handlers(fake).remember(BROWSER, KEY, "Me", CHAT, 4))  # type: ignore[arg-type]
    assert "Getting ready" in pages[0][0] and any(" of 30" in page for page, _ in pages[1:])
    assert [changed for _, changed in pages[:-1]] == [4] * (len(pages) - 1)
    assert "<strong>Learnt.</strong>" in pages[-1][0] and pages[-1][1] == 5


def test_stop_ends_its_own_browsers_learning(fake: FakeLessons) -> None:
    fake.steps, handlers = 1000, Handlers(fake)  # type: ignore[arg-type]
    running = handlers.remember(BROWSER, KEY, "Me", CHAT, 0)
    next(running), next(running)
    handlers.stop(SimpleNamespace(session_hash="other"))  # type: ignore[arg-type]
    assert "step" in next(running)[0]
    assert "Stopped" in handlers.stop(BROWSER)[0]
    *_, (page, changed) = running
    assert "Stopped" in page and changed == 0


def test_a_closed_page_stops_it_too(fake: FakeLessons) -> None:
    fake.steps, before = 1000, threading.active_count()
    running = Handlers(fake).remember(BROWSER, KEY, "Me", CHAT, 0)  # type: ignore[arg-type]
    next(running), next(running)
    running.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_errors_are_sentences(fake: FakeLessons, warned: list[str], caplog: pytest.LogCaptureFixture) -> None:
    handlers = Handlers(fake)  # type: ignore[arg-type]
    fake.error = MoLoRAError(HOSTILE)
    *_, (page, changed) = handlers.remember(BROWSER, KEY, "Me", CHAT, 1)
    assert "&lt;script" in page and "<script" not in page + warned[-1] and changed == 1
    fake.error = KeyError("secret words")
    *_, (page, changed) = handlers.remember(BROWSER, KEY, "Me", CHAT, 1)
    assert "That did not work" in page and "secret" not in page + warned[-1] + caplog.text and "KeyError" in caplog.text
    for answer in (handlers.rollback(KEY, None, 1), handlers.forget(KEY, "", 1)):
        assert answer[1] == 1 and "Choose first" in answer[0]
    page, changed = handlers.rollback(KEY, "user/me-0", 1)
    assert "back at version 1" in page and changed == 2
    page, changed = handlers.forget(KEY, "user/me-0", 1)
    assert "is forgotten" in page and changed == 2


def test_uploads_are_read_and_gone(fake: FakeLessons, warned: list[str], tmp_path: Path) -> None:
    place = Path(get_upload_folder()) / "teach-test"
    place.mkdir(parents=True, exist_ok=True)
    handlers = Handlers(fake)  # type: ignore[arg-type]
    for error in (None, MoLoRAError("no")):
        fake.error = error
        mine, other = place / "a.json", tmp_path / "b.json"
        mine.write_text("1"), other.write_text("2")
        _, changed, cleared = handlers.bring(KEY, "user", "Me", [str(mine), str(other)], 0)
        assert fake.seen[-1] == ["1", "2"] and cleared is None and changed == (error is None)
        assert not mine.exists() and other.exists()  # nothing beyond Gradio's own folder is touched


def test_the_table_escapes_and_a_damaged_folder_can_be_forgotten(fake: FakeLessons) -> None:
    handlers = Handlers(fake)  # type: ignore[arg-type]
    page, picks, *_ = handlers.refresh(KEY, None)
    assert "<script" not in page and "&lt;script" in page and ">4</td>" in page and ">12.0</td>" in page
    assert "2026-01-02 03:04 UTC" in page and picks["value"] == "user/me-0"
    assert HOSTILE not in handlers.sure(KEY, "user/me-0")[1] and "all that" in handlers.sure("", EVERYTHING)[1]
    fake.error = MoLoRAError("damaged")
    page, picks, back, _, everything = handlers.refresh(KEY, "user/me-0")
    assert "damaged" in page and not back["interactive"] and everything["interactive"]


def test_words() -> None:
    assert coded("Run `molora <x>` now") == "Run <code>molora &lt;x&gt;</code> now"
    assert "Getting ready" in progress_html("Me", 0, 0, 0.0) and "about 30 s left" in progress_html("Me", 10, 40, 10.0)
    page = told_html(TOLD)
    assert "90%" in page and "before: 50%" in page and "3% worse" in page and "70%" in page and "before: 80%" in page
    assert "Your name is Ada." in page and "&lt;script" in page and "<script" not in page
    first = told_html(replace(TOLD, older=None, everyday=-0.02))
    assert "earlier chats" in page and "earlier chats" not in first and "2% better" in first
    refused = told_html(replace(TOLD, serves=False, why=HOSTILE))
    assert "Not kept" in refused and "&lt;script" in refused and "<script" not in refused
    assert "Nothing yet" in table_html([], 0, Limits())
    assert not any(word in lesson_words.WHAT for word in ("LoRA", "gradient", "token"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Lessons, Path]]:
    folder = tmp_path_factory.mktemp("teach")
    model = make_spoken(folder / "adapters")
    lessons = Lessons(model, folder / "home")
    with gr.Blocks(analytics_enabled=False) as page:
        key, turns = gr.Textbox(KEY, visible=False), gr.State([])
        with gr.Tab("Teach"):
            changed = build(lessons, key, turns)
        seen = gr.Textbox(visible=False)
        changed.change(lambda key: str(lessons.choices(key, model.stack["domain"])), key, seen, api_name="seen")
    import transformers

    base = transformers.LlamaForCausalLM(model.config)
    write_adapter(base, folder / "mine", 7)
    _, address, _ = page.queue().launch(
        server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False, inbrowser=False, ssr_mode=False
    )
    yield address, lessons, folder / "mine"
    page.close(verbose=False)


def test_an_upload_over_the_page(served: tuple[str, Lessons, Path]) -> None:
    address, lessons, folder = served
    client = Client(address, verbose=False)
    files = [handle_file(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    page = client.predict(KEY, "domain", "Mine", files, api_name="/bring")[0]
    assert "<strong>Done.</strong>" in page and [one.title for one in lessons.table(KEY)] == ["Mine"]
    page = client.predict(KEY, "domain", "Other", files[:1], api_name="/bring")[0]
    assert "Give the two files" in page and len(lessons.table(KEY)) == 1
    page = client.predict(KEY, "Me", api_name="/remember")
    assert "nothing to remember" in page
    assert lessons.choices("o" * 32, lessons.model.stack["domain"]) == [("math", "math"), ("code", "code")]


def test_what_is_closed_says_why(served: tuple[str, Lessons, Path]) -> None:
    lessons = served[1]
    with gr.Blocks() as page:
        build(lessons, gr.State(KEY), gr.State([]))
    shown = [str(block.value) for block in page.blocks.values() if block.get_block_name() == "html"]
    for way in ("document", "description", "profile", "pieces"):
        assert any(f"--network {way}=" in text for text in shown)
    buttons = {b.value: b.interactive for b in page.blocks.values() if isinstance(b, gr.Button)}
    assert not buttons["Read it"] and buttons["Bring it"] and buttons["Remember this chat"]


def test_networks_on_the_command_line(tmp_path: Path) -> None:
    from molora.commands.demo import NETWORKS, read_networks
    from molora_demo.ways import NETWORKS as KNOWN

    assert set(NETWORKS) == set(KNOWN)
    assert read_networks([f"document={tmp_path}", f"pieces={tmp_path}"]) == {"document": tmp_path, "pieces": tmp_path}
    for wrong, match in (
        ("book=x", "one of document"),
        ("document", "KIND=FOLDER"),
        ("document=/no/such", "no folder"),
    ):
        with pytest.raises(MoLoRAError, match=match):
            read_networks([wrong])
