"""Takes the README's picture of the demo: serves a saved MoLoRA, asks it one thing in headless Chromium, saves a PNG.

Needs `pip install playwright` and a Chromium (Debian: `apt-get install chromium`); no browser is downloaded.
"""

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from molora_demo.app import build, serve
from molora_demo.chat import EXAMPLES
from molora_demo.source import LocalSource

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


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(page: Page, address: str, prompts: Sequence[str], picks: Sequence[tuple[str, str]], patience_s: float) -> None:
    """Opens the demo, picks (layer, adapter) pairs, sends each prompt and waits for the whole answer."""
    page.goto(address)
    for layer, adapter in picks:
        page.get_by_label(layer.capitalize()).first.click()
        page.get_by_role("option", name=adapter, exact=True).click()
    for number, prompt in enumerate(prompts, 1):
        page.get_by_placeholder("Write a message").fill(prompt)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "n => document.querySelectorAll('.answer .stats, .failed').length >= n",
            arg=number,
            timeout=patience_s * 1000,
        )
        page.wait_for_timeout(500)


def shoot(
    model: Any,
    file: Path,
    prompts: Sequence[str],
    picks: Sequence[tuple[str, str]],
    browser: str,
    patience_s: float = 300,
) -> None:
    """Saves a picture of the demo of ``model`` after it has answered ``prompts``."""
    address = serve(build(LocalSource(model)), port=free_port(), open_browser=False, block=False)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=BROWSER_FLAGS)
        page = chromium.new_page(viewport={"width": 1320, "height": 860}, device_scale_factor=1.5, color_scheme="light")
        ask(page, address, prompts, picks, patience_s)
        file.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=file)
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a saved MoLoRA")
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.png"))
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--pick", action="append", default=[], metavar="LAYER=ADAPTER", help="e.g. personality=sage")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    args = parser.parse_args()
    from molora import MoLoRAModel

    picks = [tuple(pick.split("=", 1)) for pick in args.pick]
    shoot(MoLoRAModel.from_pretrained(args.folder), args.out, args.prompt or EXAMPLES[-1:], picks, args.browser)


if __name__ == "__main__":
    main()
