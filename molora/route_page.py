"""Routes as one self-contained HTML page: the text once for each layer, coloured by the adapter that acted."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from molora.colors import FILLS, INK, Route, fill_of, shares, speaker
from molora.stack import StackLayer

_LAYOUT = """\
:root { color-scheme: light dark; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 0.4rem; }
ul { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; margin: 0 0 0.6rem; padding: 0; list-style: none; }
p { margin: 0; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
span { padding: 0.12em 0; border-radius: 3px; }
li span { padding: 0.12em 0.4em; }
p span:hover { outline: 1.5px solid; }
"""


def route_page(tokens: Sequence[tuple[str, Route]], layers: Iterable[StackLayer], title: str) -> str:
    """The page for ``tokens`` (text, route). Hovering over a run of tokens tells every adapter and its weight."""
    sections = "".join(_section(tokens, layer) for layer in layers)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_style()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{sections}</body>\n</html>\n"
    )


def route_text(route: Route) -> str:
    """ "domain: math 0.75, code 0.25", a line for each layer."""
    lines = []
    for layer, group in groupby(route, key=lambda entry: entry[0]):
        acted = ", ".join(f"{adapter} {weight:.2f}" for _, adapter, weight in group if adapter is not None)
        lines.append(f"{layer}: {acted or 'none'}")
    return "\n".join(lines)


def _style() -> str:
    def colors(theme: int, paper: str) -> str:
        fills = " ".join(f".fill-{number} {{ background: {fill[theme]}; }}" for number, fill in enumerate(FILLS))
        return f"body {{ background: {paper}; color: {INK[theme]}; }} {fills}"

    return f"{_LAYOUT}{colors(0, INK[1])}\n@media (prefers-color-scheme: dark) {{ {colors(1, INK[0])} }}\n"


def _section(tokens: Sequence[tuple[str, Route]], layer: StackLayer) -> str:
    found = shares((route for _, route in tokens), layer.name)
    legend = "".join(
        f"<li><span{_mark(layer, name)}>{escape(name or 'none')}</span> {part:.0%}</li>" for name, part in found.items()
    )
    spans = []
    for label, run in groupby(tokens, key=lambda token: route_text(token[1])):
        members = list(run)
        text = escape("".join(text for text, _ in members))
        spans.append(f'<span{_mark(layer, speaker(members[0][1], layer.name))} title="{escape(label)}">{text}</span>')
    return f"<h2>{escape(layer.name)}</h2>\n<ul>{legend}</ul>\n<p>{''.join(spans)}</p>\n"


def _mark(layer: StackLayer, adapter: str | None) -> str:
    fill = fill_of(layer, adapter)
    return "" if fill is None else f' class="fill-{fill}"'
