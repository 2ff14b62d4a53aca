"""Lighthouse's accessibility score of every tab of the demo, light and dark, on a desktop and a phone.

    npm install --prefix ~/lighthouse lighthouse@12.8.2
    python -m tools.lighthouse starter ~/lighthouse

Each tab is audited with something in it: what the pictures of docs/demo.md show. Needs what tools/screenshot.py needs,
and Node with Lighthouse, which nothing else here does.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from molora_demo.app import build, local, serve
from molora_demo.chat import EXAMPLES
from molora_demo.lessons import Lessons
from tools.screenshot import BROWSER_FLAGS, PATIENCE_MS, TABS, chat, free_port

AUDIT = Path(__file__).with_suffix(".mjs")
WORK = {"Chat": lambda page: chat(page, EXAMPLES[1:2], []), **TABS}


def audit(npm: Path, port: int) -> dict[str, Any]:
    """By screen what Lighthouse says of the page that the browser at ``port`` has open."""
    told = subprocess.run(["node", AUDIT, npm.resolve(), str(port)], stdout=subprocess.PIPE, check=True, timeout=300)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def looked_at(page: Page, tab: str) -> None:
    """Opens a tab and brings something into it."""
    page.get_by_role("tab", name=tab, exact=True).click()
    WORK[tab](page)
    page.wait_for_timeout(2500)  # the monitor renews itself every two seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a saved MoLoRA")
    parser.add_argument("npm", type=Path, help="the folder in which Lighthouse was installed")
    parser.add_argument("--browser", default=os.environ.get("MOLORA_CHROMIUM", "/usr/bin/chromium"))
    args = parser.parse_args()
    source, home, debug = local(args.folder), tempfile.TemporaryDirectory(), free_port()
    address = serve(build(source, Lessons(source.model, home.name)), port=free_port(), open_browser=False, block=False)
    flags = [*BROWSER_FLAGS, f"--remote-debugging-port={debug}"]
    failed = set()
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=args.browser, args=flags)
        for colours in ("light", "dark"):
            page = chromium.new_page(color_scheme=colours)
            page.set_default_timeout(PATIENCE_MS)
            page.goto(address)
            page.get_by_label("Conversations").wait_for()
            for tab in WORK:
                looked_at(page, tab)
                for screen, said in audit(args.npm, debug).items():
                    print(f"{tab:<8} {colours:<5} {screen:<7} {said['score']:>3}, {said['audits']} audits", flush=True)
                    failed |= {(name, node) for name, nodes in said["failed"] for node in nodes}
                    version = said["version"]
            page.close()
        chromium.close()
    print(f"Lighthouse {version}. Failed: {'none' if not failed else ''}")
    for name, node in sorted(failed):
        print(f"  {name}: {node}")


if __name__ == "__main__":
    main()
