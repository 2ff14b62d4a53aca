"""Every tab's main path on the starter stack."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from molora_demo.app import build, local, serve
from tests.browser.visit import ask, tab
from tests.demo.test_app import free_port

STARTER = Path(__file__).parents[2] / "starter"


@pytest.fixture(scope="module")
def starter() -> Iterator[str]:
    blocks = build(local(STARTER))
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

    tab(page, "Monitor")
    expect(page.locator("#monitor tr", has_text="Answers on this page").locator("td")).to_have_text("5")
