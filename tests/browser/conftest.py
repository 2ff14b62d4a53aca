"""A real browser for the demo's page. Where none is installed `make test` leaves these tests out, and says so."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from molora_demo.app import build, serve
from molora_demo.source import LocalSource
from tests.browser.visit import Visit
from tests.demo.fake_model import FakeModel
from tools.screenshot import BROWSER_FLAGS, free_port

CHROMIUM = os.environ.get("MOLORA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Install a Chromium (Debian: apt-get install chromium), or name one in MOLORA_CHROMIUM."
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(delay_s=0.01)


@pytest.fixture(scope="module")
def address(model: FakeModel) -> Iterator[str]:
    page = build(LocalSource(model))
    yield serve(page, port=free_port(), open_browser=False, block=False)
    page.close(verbose=False)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page in a browser of its own. At the end none of them may have had an error or asked another host."""
    visits: list[Visit] = []

    def open_page(address: str, **settings: object) -> Page:
        visits.append(Visit(browser, address, settings))
        return visits[-1].page

    yield open_page
    for one in visits:
        one.close()
    assert [error for one in visits for error in one.errors] == []
    assert [url for one in visits for url in one.outside] == []
