"""One browser that looks at the page, and what it complains of meanwhile."""

import re
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect

PATIENCE_MS = 30_000
# Gradio's own words for its streams that end when a page is left; nobody sees them.
LEAVING = ("BodyStreamBuffer was aborted", "signal is aborted without reason", "Connection errored out")

expect.set_options(timeout=PATIENCE_MS)


class Visit:
    """A browser with a storage of its own."""

    def __init__(self, browser: Browser, address: str, settings: dict[str, Any]) -> None:
        self.address, self.errors, self.outside = address, [], []  # type: ignore[var-annotated]
        self.context = browser.new_context(**{"viewport": {"width": 1320, "height": 860}, **settings})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(address)
        self.page.get_by_placeholder("Write a message").wait_for()
        expect(self.page.get_by_label("Conversations")).to_have_value(re.compile(".+"))  # the page's start has run

    def close(self) -> None:
        self.context.close()

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(words in message.text for words in LEAVING):
            self.errors.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.outside.append(request.url)


def ask(page: Page, prompt: str) -> str:
    """The text of the last answer."""
    page.get_by_placeholder("Write a message").fill(prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#conversation .prompt").last).to_contain_text(prompt)
    expect(page.locator("#conversation .turns[aria-busy=true]")).to_have_count(0)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    return page.locator("#conversation .answer .text, #conversation .failed").last.inner_text()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
