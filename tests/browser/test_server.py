"""The page over a server that is killed and comes back."""

from collections.abc import Callable

from playwright.sync_api import Page, expect

from molora.serve.app import build_app
from molora_demo.app import build, serve
from molora_demo.remote import ServerSource
from tests.browser.visit import ask, tab
from tests.serve.fake_engine import FakeEngine
from tests.serve.live import serving
from tools.screenshot import free_port


def test_a_killed_server_is_named_and_answers_again(visit: Callable[..., Page]) -> None:
    engine, port = FakeEngine(), free_port()
    with serving(build_app(engine), port):
        source = ServerSource(f"http://127.0.0.1:{port}")
        blocks = build(source)
        page = visit(serve(blocks, port=free_port(), open_browser=False, block=False))
        assert ask(page, "hello") == "Hello there"
        assert [found.inner_text() for found in page.get_by_role("tab").all()] == ["Chat", "Compare", "Monitor"]
        tab(page, "Monitor")
        expect(page.locator("#monitor")).to_contain_text("of at most 8")
        tab(page, "Chat")
    assert "does not answer. Start it" in ask(page, "are you there?")
    expect(page.locator(".toast-body").last).to_contain_text("does not answer. Start it")
    expect(page.get_by_placeholder("Write a message")).to_have_value("are you there?")
    tab(page, "Monitor")
    expect(page.locator("#monitor")).to_contain_text("The server does not answer")
    tab(page, "Chat")
    with serving(build_app(engine), port):
        assert ask(page, "and now?") == "Hello there"
        engine.model.stack["domain"].adapters["law"] = "x"
        ask(page, "what is new?")
        page.reload()
        page.get_by_label("Domain", exact=True).first.click()
        expect(page.get_by_role("option", name="law", exact=True)).to_be_visible()
        page.keyboard.press("Escape")
        engine.ending = "error"
        assert "secret" not in ask(page, "break off") and page.locator("#conversation .failed").count() == 1
    assert "Traceback" not in page.content()
    page.context.close()
    blocks.close(verbose=False)
