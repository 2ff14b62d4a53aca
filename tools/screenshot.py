"""Takes the pictures of the demo for the README and the docs: every tab of a saved MoLoRA, in headless Chromium.

Needs the extras `demo` and `dev` and a Chromium (Debian: `apt-get install chromium`); no browser is downloaded.
"""

import argparse
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from molora_demo.app import build, local, serve
from molora_demo.chat import EXAMPLES
from molora_demo.lessons import Lessons

BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
PATIENCE_MS = 300_000


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chat(page: Page, prompts: Sequence[str], picks: Sequence[tuple[str, str]]) -> None:
    """Picks (layer, adapter) pairs, sends each prompt and waits for the whole answer."""
    for layer, adapter in picks:
        page.get_by_label(layer.capitalize(), exact=True).first.click()
        page.get_by_role("option", name=adapter, exact=True).click()
        page.keyboard.press("Escape")
    for number, prompt in enumerate(prompts, 1):
        page.get_by_placeholder("Write a message").fill(prompt)
        page.keyboard.press("Enter")
        page.wait_for_function("n => document.querySelectorAll('#past .answer .stats').length >= n", arg=number)
        page.wait_for_timeout(500)


def compare(page: Page) -> None:
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("() => document.querySelectorAll('.compare .pane .stats:not(.waits)').length >= 4")
    page.get_by_role("button", name="Compare").and_(page.locator(":enabled")).wait_for()


def routes(page: Page) -> None:
    page.get_by_role("button", name="Medicine and code").click()
    page.locator("#reading .tok", has_text="return").first.click()
    page.locator("#detail .one").wait_for()


TABS: dict[str, Callable[[Page], None]] = {
    "Compare": compare,
    "Routes": routes,
    "Teach": lambda page: None,
    "Monitor": lambda page: None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a saved MoLoRA")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/images"), help="the folder of demo.png, demo-routes.png, ..."
    )
    parser.add_argument("--prompt", action="append", help="of the chat; may be given several times")
    parser.add_argument("--pick", action="append", default=[], metavar="LAYER=ADAPTER", help="e.g. personality=sage")
    parser.add_argument("--browser", default=os.environ.get("MOLORA_CHROMIUM", "/usr/bin/chromium"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = local(args.folder)
    home = tempfile.TemporaryDirectory()
    address = serve(build(source, Lessons(source.model, home.name)), port=free_port(), open_browser=False, block=False)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=args.browser, args=BROWSER_FLAGS)
        page = chromium.new_page(viewport={"width": 1320, "height": 860}, device_scale_factor=1.5, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        chat(page, args.prompt or EXAMPLES[:2], [tuple(pick.split("=", 1)) for pick in args.pick])
        page.evaluate("() => window.scrollTo(0, 0)")
        page.screenshot(path=args.out / "demo.png")
        for name, work in TABS.items():
            page.get_by_role("tab", name=name, exact=True).click()
            work(page)
            page.wait_for_timeout(2500)  # the monitor renews itself every two seconds
            page.screenshot(path=args.out / f"demo-{name.lower()}.png", full_page=True)
        chromium.close()


if __name__ == "__main__":
    main()
