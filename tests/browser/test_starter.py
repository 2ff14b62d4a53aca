"""Every tab's main path on the starter stack."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from molora_demo.app import build, local, serve
from molora_demo.lessons import Lessons
from tests.browser.visit import ask, tab
from tools.screenshot import free_port

STARTER = Path(__file__).parents[2] / "starter"


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    source = local(STARTER)
    blocks = build(source, Lessons(source.model, tmp_path_factory.mktemp("lessons")))
    yield serve(blocks, port=free_port(), open_browser=False, block=False)
    blocks.close(verbose=False)


def test_every_tabs_main_path(visit: Callable[..., Page], starter: str) -> None:
    page = visit(starter)
    assert ask(page, "Write a Python function that adds two numbers.")
    expect(page.locator("#conversation .shares").last).to_contain_text("code")

    tab(page, "Compare")
    page.get_by_label("number input for Most new tokens").last.fill("16")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".compare .pane .stats:not(.waits)")).to_have_count(4)
    expect(page.get_by_role("button", name="Compare")).to_be_enabled()
    assert "no domain adapter 100%" in page.locator(".compare .pane").first.inner_text()

    tab(page, "Routes")
    page.get_by_role("button", name="Medicine and code").click()
    expect(page.locator("#reading .tok").first).to_be_visible()
    page.locator("#reading .tok", has_text="return").first.click()
    expect(page.locator("#detail")).to_contain_text("code")
    with page.expect_download() as told:
        page.get_by_role("button", name="Download CSV").click()
    assert "return" in told.value.path().read_text("utf-8-sig")

    tab(page, "Teach")
    page.get_by_role("button", name="Bring an adapter").click()
    folder = STARTER / "adapters" / "personality" / "pirate"
    page.locator("input[type=file]").first.set_input_files(
        [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    )
    page.get_by_label("Name").nth(1).fill("My pirate")
    page.get_by_label("Layer").first.click()
    page.get_by_role("option", name="personality", exact=True).click()
    expect(page.get_by_text("adapter_model.safetensors", exact=False).first).to_be_visible()
    page.get_by_role("button", name="Bring it").click()
    expect(page.locator(".block.teach-table")).to_contain_text("My pirate")
    tab(page, "Chat")
    page.get_by_label("Personality", exact=True).first.click()
    page.get_by_role("option", name="My pirate (yours)").click()
    page.keyboard.press("Escape")
    ask(page, "Who are you?")
    expect(page.locator("#conversation .shares").last).to_contain_text("My pirate 100%")

    other = visit(starter)
    other.get_by_label("Personality", exact=True).first.click()
    expect(other.get_by_role("option", name="pirate", exact=True)).to_be_visible()
    expect(other.get_by_role("option", name="My pirate (yours)")).to_have_count(0)

    tab(page, "Teach")
    page.get_by_role("button", name="Forget", exact=True).click()
    page.get_by_role("button", name="Yes, delete it").click()
    expect(page.locator(".block.teach-table")).not_to_contain_text("My pirate")
    tab(page, "Chat")
    page.get_by_label("Personality", exact=True).first.click()
    expect(page.get_by_role("option", name="pirate", exact=True)).to_be_visible()
    expect(page.get_by_role("option", name="My pirate (yours)")).to_have_count(0)

    tab(page, "Monitor")
    expect(page.locator("#monitor tr", has_text="Answers on this page").locator("td")).to_have_text("6")
