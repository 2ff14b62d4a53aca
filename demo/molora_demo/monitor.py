"""What is going on: answers under way, what lies where, who speaks how much."""

from collections.abc import Mapping, Sequence
from statistics import median

import gradio as gr

from molora.errors import MoLoRAError
from molora_demo.page import QUIET, Page, explain
from molora_demo.render import Stats, balance_html, table_html
from molora_demo.source import Numbers

EVERY_S = 2.0
TAUGHT = {
    "hits": "Taught adapters asked for that were in the model (hits)",
    "misses": "Taught adapters that were put into it (misses)",
    "evictions": "Taught adapters that left it to make room (evictions)",
}
EXPLAINED = """\
The figures are those of now and renew themselves. **Under way** tells how many answers are being written and how
many wait. **Adapters** tells how many lie in the model, ready to act, and how many elsewhere; **Since the start**,
how many of those that were asked for were there, and how many had to leave to make room. **Who speaks** tells
what part of all words since the start each adapter wrote: a router that sends everything to one adapter would show
here. Of what people write, nothing is counted or shown."""


def build(page: Page, tab: gr.Tab, others: Sequence[gr.Tab]) -> None:
    """The tab. Its figures renew themselves while it is looked at; ``others`` are the tabs that end that."""
    view = gr.HTML(elem_id="monitor")
    explain(EXPLAINED)

    def look() -> str:
        try:
            return monitor_html(page, page.source.numbers())
        except MoLoRAError as error:
            return table_html("Under way", [("The server does not answer", str(error))])

    timer = gr.Timer(EVERY_S, active=False)
    timer.tick(look, None, view, **QUIET, queue=False)
    tab.select(lambda: (look(), gr.Timer(active=True)), None, [view, timer], **QUIET, queue=False)
    gr.on([other.select for other in others], lambda: gr.Timer(active=False), None, timer, **QUIET, queue=False)


def monitor_html(page: Page, now: Numbers) -> str:
    """All figures."""
    tally = page.tally
    running = now.running if page.source.model is None else len(page.running)
    parts = [
        table_html(
            "Under way",
            [
                ("Answers being written", f"{running}" + (f" of at most {now.rows}" if now.rows else "")),
                ("Waiting", f"{now.waiting}"),
                ("Answers on this page since its start", f"{tally.answers}"),
                *_pace(list(tally.recent)),
            ],
        ),
        table_html("Adapters", [*_places(now.places), *((name, size(count)) for name, count in now.bytes.items())]),
    ]
    if counts := {**now.counts, **_taught(page)}:
        parts.append(table_html("Since the start", [(name, f"{count:,.0f}") for name, count in counts.items()]))
    for layer in page.palette.layers:
        parts.append(balance_html(layer.name, page.public(layer), tally.spoken[layer.name], page.palette))
    return f'<div class="figures">{"".join(parts)}</div>'


def _pace(recent: Sequence[Stats]) -> list[tuple[str, str]]:
    first = [stats.first_s for stats in recent if stats.first_s is not None]
    pace = [stats.tokens_per_s for stats in recent if stats.tokens_per_s is not None]
    told = [("Time to the first token, median", f"{median(first):.2f} s")] if first else []
    return told + ([("Tokens a second in an answer, median", f"{median(pace):.1f}")] if pace else [])


def _taught(page: Page) -> dict[str, int]:
    """How what browsers taught was found in the model; nobody's in particular."""
    if page.lessons is None:
        return {}
    return {shown: page.lessons.private.counts[name] for name, shown in TAUGHT.items()}


def _places(places: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    return [(f"{layer}, {place}", f"{count}") for place, layers in places.items() for layer, count in layers.items()]


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
