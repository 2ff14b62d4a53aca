"""Tokens and routes as HTML: pure functions, and the one place where text from a model or a person is escaped."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from molora.stack import AUTO, StackLayer

Route = Sequence[tuple[str, str | None, float]]
"""(layer, adapter or None, weight) of every adapter that acted while a token was produced."""

ALIKE = 1e-3  # a difference of weights that makes nobody the one who speaks
FILLS = 8  # backgrounds in style.css, one an adapter of the speaking layer; more adapters go round again
LINES = 6  # underline colours in style.css, for the adapters of the other layers
LINE_STYLES = ("line", "dots")  # the first two other layers are drawn; the hover text names all of them


class Token(Protocol):
    """What is read of a streamed token."""

    @property
    def text(self) -> str: ...
    @property
    def route(self) -> Route: ...


@dataclass(frozen=True)
class Stats:
    """How fast an answer came.

    tokens: how many there are.
    first_s: seconds until the first one, None before it.
    rest_s: seconds from the first to the last.
    """

    tokens: int
    first_s: float | None
    rest_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """The pace after the first token; None while there are fewer than two."""
        return (self.tokens - 1) / self.rest_s if self.tokens > 1 and self.rest_s > 0 else None


class Palette:
    """Which colour each adapter of a stack has: fixed by its place in the stack, so the same in every answer. One that
    comes later has the next.

    The speaking layer (the first that the router decides by default, else the first that is not shared) gives a
    token its background; the other layers underline it.

    Args:
        layers: the stack's layers, at least one.
    """

    def __init__(self, layers: Sequence[StackLayer]) -> None:
        routed = [layer for layer in layers if layer.default == AUTO]
        told = [layer for layer in layers if not layer.shared]
        self.speaking = (routed or told or list(layers))[0]
        self.others = [layer for layer in layers if layer is not self.speaking]
        self.layers = [self.speaking, *self.others]
        accents = [(layer.name, name) for layer in self.others for name in layer.adapters]
        self._fills = {name: place % FILLS for place, name in enumerate(self.speaking.adapters)}
        self._lines = {key: place % LINES for place, key in enumerate(accents)}

    def css_class(self, layer: str, adapter: str | None) -> str:
        """The style.css class that marks ``adapter`` of ``layer``; "" where it has none."""
        if adapter is None:
            return ""
        if layer == self.speaking.name:
            return f"fill-{self._fills.setdefault(adapter, len(self._fills) % FILLS)}"
        place = [other.name for other in self.others].index(layer)
        colour = self._lines.setdefault((layer, adapter), len(self._lines) % LINES)
        return f"{LINE_STYLES[place]}-{colour}" if place < len(LINE_STYLES) else ""

    def mark(self, route: Route, layer: str) -> str:
        """The class of a token in a layer: its speaker's; of the speaking layer one of its own where several speak
        alike."""
        acted = sorted(
            (weight for name, adapter, weight in route if name == layer and adapter is not None), reverse=True
        )
        if layer == self.speaking.name and len(acted) > 1 and acted[0] - acted[1] < ALIKE:
            return "fill-many"
        return self.css_class(layer, speaker(route, layer))


def escape(text: str) -> str:
    """``text`` safe in element content and quoted attributes, and inert in Gradio's own ``${}`` and ``{{}}``."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def speaker(route: Route, layer: str) -> str | None:
    """The adapter of ``layer`` with the largest weight, None where none acted."""
    acted = [(weight, adapter) for name, adapter, weight in route if name == layer and adapter is not None]
    return max(acted, key=lambda pair: pair[0])[1] if acted else None


def route_text(route: Route, palette: Palette) -> str:
    """One line a layer: "domain: math 0.75, code 0.25"."""
    lines = []
    for layer in palette.layers:
        acted = [f"{adapter} {weight:.2f}" for name, adapter, weight in route if name == layer.name and adapter]
        lines.append(f"{layer.name}: {', '.join(acted) or 'none'}")
    return "\n".join(lines)


def tokens_html(tokens: Iterable[Token], palette: Palette) -> str:
    """Coloured text; neighbours whose route reads the same share one span, which keeps long answers light."""
    spans = []
    for label, run in groupby(tokens, key=lambda token: route_text(token.route, palette)):
        members = list(run)
        text = "".join(token.text for token in members)
        if not text:
            continue
        marks = [palette.mark(members[0].route, layer.name) for layer in palette.layers]
        classes = " ".join(["run", *filter(None, marks)])
        spans.append(f'<span class="{classes}" data-route="{escape(label)}">{escape(text)}</span>')
    return "".join(spans)


def shares(tokens: Iterable[Token], layer: str) -> list[tuple[str | None, float]]:
    """(adapter or None, part of the tokens that it spoke), largest first; the parts sum to 1. Adapters that act on a
    token together share it by their weights."""
    parts: Counter[str | None] = Counter()
    for token in tokens:
        acted = [(adapter, abs(weight)) for name, adapter, weight in token.route if name == layer and adapter]
        whole = sum(weight for _, weight in acted)
        for adapter, weight in acted if whole else [(None, 1.0)]:
            parts[adapter] += weight / (whole or 1.0)  # type: ignore[assignment]
    count = sum(parts.values())
    return [(name, part / count) for name, part in parts.most_common()]


def shares_html(tokens: Sequence[Token], palette: Palette) -> str:
    """A bar of the speaking layer, and every share in words (of the other layers: where one of theirs acted)."""
    if not tokens:
        return ""
    parts = shares(tokens, palette.speaking.name)
    bar = "".join(
        f'<i class="{palette.css_class(palette.speaking.name, name)}" style="flex-grow:{part:.4f}"></i>'
        for name, part in parts
    )
    items = [_share_item(palette, palette.speaking.name, name, part) for name, part in parts]
    for layer in palette.others:
        acted = [(name, part) for name, part in shares(tokens, layer.name) if name is not None]
        items += [_share_item(palette, layer.name, name, part) for name, part in acted]
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul class="shares">{"".join(items)}</ul>'


def _share_item(palette: Palette, layer: str, name: str | None, part: float) -> str:
    label = name or f"no {layer} adapter"
    return f"<li>{_swatch(palette.css_class(layer, name))}{escape(label)} {part:.0%}</li>"


def _swatch(css_class: str) -> str:
    return f'<span class="swatch {css_class or "empty"}" aria-hidden="true">Aa</span>'


def stats_text(stats: Stats) -> str:
    """ "48 tokens, 19.2 tokens/s, first token in 0.31 s"."""
    if stats.first_s is None:
        return ""
    parts = [f"{stats.tokens} token{'s' if stats.tokens != 1 else ''}"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    return ", ".join([*parts, f"first token in {stats.first_s:.2f} s"])


def legend_html(palette: Palette) -> str:
    """Every adapter's mark and name, layer by layer, and how the layer is drawn."""
    groups = []
    for layer in palette.layers:
        drawn = "background" if layer is palette.speaking else _line_name(palette, layer)
        items = [f"<li>{_swatch(palette.css_class(layer.name, name))}{escape(name)}</li>" for name in [*layer.adapters]]
        if layer is palette.speaking:
            items.append(f"<li>{_swatch('')}none: the base model alone</li>")
        groups.append(f"<dt>{escape(layer.name)} <small>{drawn}</small></dt><dd><ul>{''.join(items)}</ul></dd>")
    return f'<section class="legend" aria-label="Legend"><h2>Who spoke</h2><dl>{"".join(groups)}</dl></section>'


def _line_name(palette: Palette, layer: StackLayer) -> str:
    place = palette.others.index(layer)
    return ("underline", "dotted underline")[place] if place < len(LINE_STYLES) else "shown on hover"


def turn_html(prompt: str, tokens: Sequence[Token], stats: Stats, palette: Palette, note: str = "") -> str:
    """A finished turn. ``note`` says why the answer ended early."""
    foot = f"{stats_text(stats)}{' · ' if note and tokens else ''}{escape(note)}"
    return _turn(prompt, tokens_html(tokens, palette), f'{shares_html(tokens, palette)}<p class="stats">{foot}</p>')


def running_html(prompt: str, tokens: Sequence[Token], palette: Palette) -> str:
    """A turn whose answer is still being written."""
    return _turn(prompt, f'{tokens_html(tokens, palette)}<span class="caret" aria-hidden="true"></span>', "")


def failed_html(prompt: str, message: str) -> str:
    """A turn that ended in an error; ``prompt`` may be empty."""
    return f'{_prompt(prompt) if prompt else ""}<div class="failed" role="alert">{escape(message)}</div>'


def answer_html(tokens: Sequence[Token], stats: Stats, palette: Palette) -> str:
    """An answer without its question, as far as it has come."""
    foot = f'{shares_html(tokens, palette)}<p class="stats">{stats_text(stats)}</p>'
    return f'<div class="pane"><div class="answer"><p class="text">{tokens_html(tokens, palette)}</p>{foot}</div></div>'


def waiting_html(why: str = "Not asked yet.") -> str:
    """A pane without an answer."""
    return f'<div class="pane"><p class="stats waits">{escape(why)}</p></div>'


def table_html(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Figures with their names."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<section><h2>{escape(title)}</h2><table>{body}</table></section>"


def balance_html(layer: str, adapters: Sequence[str], spoken: Mapping[str | None, int], palette: Palette) -> str:
    """How many of all tokens each of a layer's adapters spoke, as bars; after them whoever else did, and none."""
    total = sum(spoken.values())
    names: list[str | None] = [*adapters, *(name for name in spoken if name and name not in adapters), None]
    rows = []
    for name in names:
        part = spoken.get(name, 0) / total if total else 0.0
        mark = palette.css_class(layer, name) if name in adapters else ""
        fill = f'<i class="{mark}" style="width:{part:.1%}"></i>'
        rows.append(
            f'<tr><th scope="row">{_swatch(mark)}{escape(name or "none")}</th>'
            f'<td class="meter" aria-hidden="true">{fill}</td><td>{part:.0%}</td></tr>'
        )
    title = f"Who speaks: {layer}"
    return f"<section><h2>{escape(title)}</h2><table>{''.join(rows)}</table></section>"


def _turn(prompt: str, text: str, foot: str) -> str:
    return f'{_prompt(prompt)}<div class="answer"><p class="text">{text}</p>{foot}</div>'


def _prompt(prompt: str) -> str:
    return f'<div class="prompt"><span class="hidden">You: </span>{escape(prompt)}</div>'


def conversation_html(turns: Sequence[str], busy: bool = False, label: str = "Conversation") -> str:
    """A conversation, or a part of it that is called ``label``, from the HTML of its turns."""
    if not turns:
        return '<div class="welcome"><p>Ask something, or start from one of the examples below.</p></div>'
    state = "true" if busy else "false"
    return f'<div class="turns" role="log" aria-label="{label}" aria-busy="{state}">{"".join(turns)}</div>'
