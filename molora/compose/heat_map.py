"""How much adapters fight as heat maps: one self-contained HTML page, or tables in a terminal."""

import math
import sys
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from molora.colors import FILLS, INK, printable
from molora.compose.interference import Pair

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

_ALONG, _AGAINST, _SHARED = FILLS[0], FILLS[1], FILLS[7]
_PAPER = "#ffffff"
_LAYOUT = """\
:root { color-scheme: light dark; }
body { max-width: 78rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h2 { font-size: 1.05rem; margin: 1.75rem 0 0; }
section { display: inline-block; max-width: 100%; margin-right: 2rem; vertical-align: top; }
p { max-width: 33rem; margin: 0 0 0.6rem; }
div { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-size: 0.9rem; }
th { font-weight: 600; text-align: left; padding: 0.1rem 0.5rem; white-space: nowrap; }
td { padding: 0.1rem 0.5rem; }
.map [scope=col] { text-align: right; }
.map td { min-width: 2.6rem; border-radius: 3px; text-align: right; font-variant-numeric: tabular-nums; }
.map td:hover { outline: 1.5px solid; }
.map td { background: color-mix(in srgb, var(--fill, transparent) var(--part, 0%), transparent); }
.along { --fill: var(--along); } .against { --fill: var(--against); } .shared { --fill: var(--shared); }
"""


class _Map(NamedTuple):
    """strength: of a value, -1 (against) to 1 (along); fills: of the two ends, as classes of the page."""

    title: str
    about: str
    figure: str
    strength: Callable[[float], float]
    ends: tuple[str, str]


_MAPS = (
    _Map("cosine", "1: they change the same weights the same way; -1: the opposite way.", "cosine",
         lambda value: value, ("against", "along")),
    _Map("sign conflict", "The share of what both change where the signs are opposite; 0.50 is chance.",
         "sign_conflict", lambda value: 1 - 2 * value, ("against", "along")),
    _Map("overlap in", "The share of the input directions that both read; some are a seed's from which both began.",
         "overlap_in", lambda value: value, ("shared", "shared")),
    _Map("overlap out", "The share of the output directions that both write.", "overlap_out",
         lambda value: value, ("shared", "shared")),
)  # fmt: skip
_COLORS = {"along": _ALONG, "against": _AGAINST, "shared": _SHARED}


class _Cell(NamedTuple):
    """text: what it shows. title: on hover. fill, part: a colour, and how much of it."""

    text: str
    title: str
    fill: str = "along"
    part: float = 0.0


class _Table(NamedTuple):
    title: str
    about: str
    columns: list[str]
    rows: list[tuple[str, list[_Cell]]]


def heat_page(names: Sequence[str], pairs: Sequence[Pair], losses: "Tensor | None", title: str) -> str:
    """The page: a map for each figure, and what to do with each pair. Hovering over a cell tells whose it is.

    Args:
        names: of N adapters, in order.
        pairs: of them, from :func:`molora.compose.interference.pairs`.
        losses: [N, N + 1] as there, or None.
    """
    sections = "".join(_section(table) for table in _tables(names, pairs, losses))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_style()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{sections}{_advice(pairs)}</body>\n</html>\n"
    )


def show(console: "Console", names: Sequence[str], pairs: Sequence[Pair], losses: "Tensor | None" = None) -> None:
    """The same in a terminal. Maps that are wider than it are left out: the reasons have the figures that decide."""
    from rich.columns import Columns
    from rich.table import Table
    from rich.text import Text

    maps = [_rich(table) for table in _tables(names, pairs, losses)]
    unbounded = console.options.update(max_width=sys.maxsize)
    fitting = [one for one in maps if console.measure(one, options=unbounded).maximum <= console.width]
    if fitting:
        console.print(Columns(fitting, padding=(1, 4)), "")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("advice", "pair", "why"):
        table.add_column(heading, overflow="fold")
    for pair in pairs:
        table.add_row(pair.advice, Text(printable(f"{pair.first} + {pair.second}")), Text(printable(pair.why)))
    console.print(table)


def _tables(names: Sequence[str], pairs: Sequence[Pair], losses: "Tensor | None") -> list[_Table]:
    of = {both: pair for pair in pairs for both in ((pair.first, pair.second), (pair.second, pair.first))}
    numbers = [str(number) for number in range(1, len(names) + 1)]
    found = []
    for one in _MAPS:
        rows = [(row, [_figure(one, of.get((row, column))) for column in names]) for row in names]
        found.append(_Table(one.title, one.about, numbers, rows))
    if losses is not None:
        about = (
            "Nats per answer token of a row's own data: alone in the diagonal, else with another, or the base alone."
        )
        rows = [(name, _loss_row(names, place, losses[place].tolist())) for place, name in enumerate(names)]
        found.append(_Table("loss", about, [*numbers, "base"], rows))
    return found


def _figure(one: _Map, pair: Pair | None) -> _Cell:
    if pair is None:
        return _Cell("", "")
    value = float(getattr(pair, one.figure))
    strength = one.strength(value)
    return _Cell(
        f"{value:z.2f}",
        f"{pair.first} and {pair.second}: {one.title} {value:z.3f}",
        one.ends[strength > 0],
        min(abs(strength), 1),
    )


def _loss_row(names: Sequence[str], place: int, values: Sequence[float]) -> list[_Cell]:
    """Full colours are a cost, or a gain, of all that the adapter gains over the base."""
    own, gain = values[place], abs(values[-1] - values[place])
    cells = []
    for value, other in zip(values, [*names, "the base alone"], strict=True):
        if math.isnan(value):
            cells.append(_Cell("", f"{names[place]}: no data"))
            continue
        what = f"with {other}" if other in names and other != names[place] else other
        part = min(abs(value - own) / gain, 1) if gain else 0.0
        title = f"data of {names[place]}, {what}: {value:.3f} ({value - own:+z.3f})"
        cells.append(_Cell(f"{value:.2f}", title, "against" if value > own else "along", part))
    return cells


def _style() -> str:
    def colors(theme: int, paper: str) -> str:
        fills = " ".join(f"--{name}: {fill[theme]};" for name, fill in _COLORS.items())
        return f"body {{ background: {paper}; color: {INK[theme]}; {fills} }}"

    return f"{_LAYOUT}{colors(0, INK[1])}\n@media (prefers-color-scheme: dark) {{ {colors(1, INK[0])} }}\n"


def _advice(pairs: Sequence[Pair]) -> str:
    rows = "".join(
        f"<tr><td>{pair.advice}</td><td>{escape(pair.first)}</td><td>{escape(pair.second)}</td>"
        f"<td>{escape(pair.why)}</td></tr>\n"
        for pair in pairs
    )
    return (
        "<h2>What to do</h2>\n<p>Rules of thumb: merge what pulls the same way, stack what barely touches, route the "
        "rest. Of weights alone they are guesses: measured losses often say otherwise, and decide where there are any."
        f"</p>\n<div><table>\n<tr><th>advice</th><th colspan=2>pair</th><th>why</th></tr>\n{rows}</table></div>\n"
    )


def _section(table: _Table) -> str:
    names = [name for name, _ in table.rows]
    heads = "".join(
        f'<th scope="col" title="{escape(name)}">{escape(column)}</th>'
        for column, name in zip(table.columns, [*names, "the base alone"], strict=False)
    )
    rows = "".join(
        f'<tr><th scope="row">{number} {escape(name)}</th>{"".join(map(_cell, cells))}</tr>\n'
        for number, (name, cells) in enumerate(table.rows, 1)
    )
    return (
        f"<section>\n<h2>{escape(table.title)}</h2>\n<p>{escape(table.about)}</p>\n"
        f'<div><table class="map">\n<tr><th></th>{heads}</tr>\n{rows}</table></div>\n</section>\n'
    )


def _cell(cell: _Cell) -> str:
    if not cell.title:
        return "<td></td>"
    return (
        f'<td class="{cell.fill}" style="--part: {cell.part:.0%}" title="{escape(cell.title)}">{escape(cell.text)}</td>'
    )


def _rich(table: _Table) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=table.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    made.add_column("", no_wrap=True)
    for column in table.columns:
        made.add_column(column, justify="right", no_wrap=True)
    for number, (name, cells) in enumerate(table.rows, 1):
        made.add_row(Text(printable(f"{number} {name}")), *(Text(cell.text, style=_style_of(cell)) for cell in cells))
    return made


def _style_of(cell: _Cell) -> str:
    return f"{INK[0]} on {_mixed(_PAPER, _COLORS[cell.fill][0], cell.part)}" if cell.text else ""


def _mixed(paper: str, fill: str, part: float) -> str:
    """A colour between two, "#rrggbb"."""
    channels = zip(bytes.fromhex(paper[1:]), bytes.fromhex(fill[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in channels)
