"""The demo as a browser sees it: first paint, first token, pace beside the same model without a page, memory over many
turns. Needs a Chromium (Debian: apt-get install chromium; or MOLORA_CHROMIUM) and the extras demo and dev.

python -m benchmarks.demo starter --turns 200
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright

from molora.bench import machine_name
from molora.provenance import commit
from molora_demo.app import build, local, serve
from tests.browser.visit import ask
from tools.screenshot import BROWSER_FLAGS, free_port

QUESTION = "Write a Python function that reverses a list, and say how long it takes."
TOKENS = 128
ROUNDS = 5
TALK = 10  # turns of a conversation
WARM = 20  # turns before memory is looked at
SHORT = 16  # tokens of an answer whose memory is looked at

# When the first coloured run of an answer is there, and when it is whole: seen by the page, for who drives the browser
# looks every half second only.
WATCH = """() => {
  const seen = window.seen = {};
  seen.observer?.disconnect();
  seen.observer = new MutationObserver(() => {
    if (!seen.first && document.querySelector('#now .run')) seen.first = performance.now();
    if (!seen.ended && document.querySelector('#past .stats')) seen.ended = performance.now();
  });
  seen.observer.observe(document.querySelector('#conversation'), {childList: true, subtree: true, characterData: true});
  seen.asked = performance.now();
}"""


def plain(model: Any, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second after it, of the model without a page."""
    began = time.perf_counter()
    first = 0.0
    count = 0
    for _ in model.stream([{"role": "user", "content": QUESTION}], max_new_tokens=tokens):
        first = first or time.perf_counter()
        count += 1
    return first - began, (count - 1) / (time.perf_counter() - first)


def shown(page: Page) -> tuple[float, float]:
    """The same of an answer in the page, as its reader has it."""
    page.get_by_role("button", name="New").click()
    page.locator("#conversation .welcome").wait_for()
    page.get_by_placeholder("Write a message").fill(QUESTION)
    page.evaluate(WATCH)
    page.keyboard.press("Enter")
    page.locator("#past .stats").wait_for(timeout=300_000)
    seen = page.evaluate("() => ({asked: window.seen.asked, first: window.seen.first, ended: window.seen.ended})")
    count = int(page.locator("#past .stats").inner_text().split()[0])
    return (seen["first"] - seen["asked"]) / 1e3, (count - 1) / (seen["ended"] - seen["first"]) * 1e3


def memory_mib() -> dict[str, float]:
    """What this process holds, the page's server and the model in it: all that is resident, and what of it is its own.

    The rest is of mapped files, the base's weights among them, which the system takes away when others need memory.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    of = {name: int(rest[0]) / 2**10 for name, *rest in lines if name in ("VmRSS:", "RssAnon:")}
    return {"resident": of["VmRSS:"], "its own": of["RssAnon:"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a saved MoLoRA")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--browser", default=os.environ.get("MOLORA_CHROMIUM", "/usr/bin/chromium"))
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    source = local(args.folder)
    address = serve(build(source), port=free_port(), open_browser=False, block=False)
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=args.browser, args=BROWSER_FLAGS)
        paints = []
        for _ in range(ROUNDS):
            page = chromium.new_page()
            page.goto(address)
            page.get_by_placeholder("Write a message").wait_for()
            paints.append(
                page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3
            )
            page.close()
        page = chromium.new_page()
        page.goto(address)
        page.get_by_label("Conversations").wait_for()
        page.get_by_role("button", name="Settings").click()
        set_tokens(page, TOKENS)
        shown(page), plain(source.model, TOKENS)
        rounds = [(shown(page), plain(source.model, TOKENS)) for _ in range(ROUNDS)]
        print(f"pace: {[f'{page[1] / alone[1]:.1%}' for page, alone in rounds]}", flush=True)
        set_tokens(page, SHORT)
        before: dict[str, float] = {}
        for turn in range(args.turns):
            if turn % TALK == 0:
                page.get_by_role("button", name="New").click()
                page.locator("#conversation .welcome").wait_for()
            ask(page, f"What is {turn} plus {turn + 1}?")
            if turn + 1 == WARM:
                before = memory_mib()
        after = memory_mib()
        chromium.close()
    figures = {
        "first_paint_s": statistics.median(paints),
        "first_token_s": statistics.median(page[0] for page, _ in rounds),
        "tokens_per_s": statistics.median(page[1] for page, _ in rounds),
        "plain_tokens_per_s": statistics.median(alone[1] for _, alone in rounds),
        "pace": statistics.median(page[1] / alone[1] for page, alone in rounds),
        "turns": args.turns,
        "memory_mib": {kind: [before[kind], after[kind]] for kind in before},
    }
    print(f"{machine_name()}, {torch.get_num_threads()} threads, commit {commit()}")
    print(f"first paint                    {figures['first_paint_s']:.2f} s")
    print(f"first token in the page        {figures['first_token_s']:.2f} s after it was asked")
    print(f"tokens a second in the page    {figures['tokens_per_s']:.1f}")
    print(f"    without a page             {figures['plain_tokens_per_s']:.1f}")
    print(f"pace, page to plain            {figures['pace']:.1%} (median of {ROUNDS} rounds, one beside the other)")
    for kind, (was, now) in figures["memory_mib"].items():
        print(f"memory, turn {WARM} to {args.turns}, {kind:<8} {was:.0f} -> {now:.0f} MiB ({now / was - 1:+.1%})")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def set_tokens(page: Page, count: int) -> None:
    """How long an answer of the chat may get."""
    page.get_by_label("number input for Most new tokens").first.fill(str(count))
    page.keyboard.press("Tab")


if __name__ == "__main__":
    main()
