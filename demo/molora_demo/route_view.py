"""A measured text as HTML: its tokens to click on, the curve of their losses, and one token in full."""

from collections.abc import Sequence
from math import ceil

from molora.colors import printable
from molora.stack import StackLayer
from molora_demo.measured import Guess, Measured, Reading, mean
from molora_demo.render import Palette, escape, route_text, shares_html, speaker

CONVENTION = (
    "A token's colour, loss and router choice are those of the position just before it, from which it was predicted, "
    "as in the chat. So the first token has none."
)
HINT = '<p class="hint">Click on a token, or move to the text with Tab and use the arrow keys, to see the choice.</p>'
EMPTY = '<p class="hint">The text will appear here, coloured by the adapters that act on it.</p>'
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})
STEP_PX = 5  # the least width of a token in the curve; a longer curve scrolls
CURVE, MIDDLE, REACH = 66.0, 86.0, 12.0  # heights of the curve, and of the differences' line and bars, of 100


def palette_for(palette: Palette, layer: StackLayer) -> Palette:
    """The colours of a text that is coloured by ``layer``: the chat's where that is its speaking layer."""
    return palette if layer.name == palette.speaking.name else Palette([layer])


def visible(text: str) -> str:
    """A token on its own: spaces and line ends can be seen."""
    return printable(text).translate(VISIBLE) or "part of a character"


def facts(reading: Reading) -> str:
    """One sentence: how many tokens, the mean losses, and which of them is lower."""
    tokens = reading.predicted
    count = f"{len(reading.tokens):,} token{'s' if len(reading.tokens) != 1 else ''}"
    if not tokens:
        return f"{count}. A loss needs a token before it."
    routed, base = mean([token.routed for token in tokens]), mean([token.base for token in tokens])
    better = sum((token.gain or 0) > 0 for token in tokens)
    return (
        f"{count}. Mean loss {routed:.3f} nats with adapters and {base:.3f} by the base alone: "
        f"{_compared(base - routed, 3)}. With adapters {better:,} of {len(tokens):,} tokens are predicted better."
    )


def _compared(gain: float, digits: int) -> str:
    if not round(gain, digits):
        return "the same"
    return f"{abs(gain):.{digits}f} {'better' if gain > 0 else 'worse'}"


def reading_html(reading: Reading, palette: Palette, colours: Palette, picked: int | None = None) -> str:
    """The whole view. palette: of the hover text. colours: of the layer that the text is coloured by."""
    notes = "".join(f"<p>{escape(note)}</p>" for note in reading.notes)
    spans = "".join(
        _token(number, token, palette, colours, number == picked) for number, token in enumerate(reading.tokens)
    )
    active = f' aria-activedescendant="tok-{picked}"' if picked is not None else ""
    return (
        f'<div class="facts"><p><b>{escape(facts(reading))}</b></p>{notes}<p>{CONVENTION}</p></div>'
        f'<section class="by" aria-label="Legend and shares">{shares_html(reading.predicted, colours)}</section>'
        f'<div class="tokens" role="listbox" tabindex="0" aria-orientation="horizontal"{active} '
        f'aria-label="Tokens. Arrow keys move, Enter shows the choice.">{spans}</div>'
        f"{curve_svg(reading.tokens, picked)}"
    )


def _token(number: int, token: Measured, palette: Palette, colours: Palette, picked: bool) -> str:
    layer = colours.speaking.name
    name = speaker(token.route, layer)
    mark = colours.mark(token.route, layer)
    text = printable(token.text)
    inner = escape(text).replace("\n", '<i aria-hidden="true">⏎</i>\n').replace("\t", '<i aria-hidden="true">⇥</i>\t')
    classes = " ".join(filter(None, ["run", "tok", mark, "" if text else "part"]))
    if token.routed is None or token.base is None:
        route = costs = "first token: no route"
    else:
        costs = f"loss {token.routed:.2f}, base {token.base:.2f}"
        route = f"{route_text(token.route, palette)}\n{costs}"
        costs = f"{name or 'none'}, {costs}"
    return (
        f'<span class="{classes}" role="option" id="tok-{number}" aria-selected="{"true" if picked else "false"}" '
        f'aria-label="{escape(f"{visible(token.text)}: {costs}")}" data-route="{escape(route)}">{inner}</span>'
    )


def curve_svg(tokens: Sequence[Measured], picked: int | None = None) -> str:
    """Both losses by token, and below them by how much the route is better. A click on it is one on its token."""
    if len(tokens) < 2:
        return ""
    routed, base = ([getattr(token, name) or 0.0 for token in tokens[1:]] for name in ("routed", "base"))
    top = max(1, ceil(max(*routed, *base)))
    gains = [token.gain or 0.0 for token in tokens[1:]]
    most = max(0.1, *map(abs, gains))
    bars = "".join(_bar(place, gain / most * REACH) for place, gain in enumerate(gains, 1) if gain)
    x = -9 if picked is None else picked + 0.5
    label = f"Loss of each token with adapters and of the base alone, from 0 to {top} nats, and their difference."
    return (
        '<figure class="curve"><figcaption><span class="key routed">with adapters</span>'
        '<span class="key base">base alone</span><span class="key better">with adapters better</span>'
        '<span class="key worse">worse</span></figcaption>'
        f'<div class="plot"><div class="axis" aria-hidden="true"><span style="top:0">{top} nats</span>'
        f'<span style="top:{CURVE}%">0</span><span style="top:{MIDDLE}%">±{most:.1f}</span></div>'
        '<div class="scroll" tabindex="0" role="group" aria-label="Loss by token">'
        f'<svg viewBox="0 0 {len(tokens)} 100" preserveAspectRatio="none" role="img" aria-label="{label}" '
        f'style="min-width:{len(tokens) * STEP_PX}px">'
        f'<path class="grid" d="M0 0.5H{len(tokens)}M0 {CURVE}H{len(tokens)}M0 {MIDDLE}H{len(tokens)}"/>{bars}'
        f'<polyline class="base" points="{_points(base, top)}"/>'
        f'<polyline class="routed" points="{_points(routed, top)}"/>'
        f'<line class="cursor" x1="{x}" x2="{x}" y1="0" y2="100"/></svg></div></div></figure>'
    )


def _points(losses: Sequence[float], top: int) -> str:
    return " ".join(f"{place + 0.5},{CURVE * (1 - loss / top):.2f}" for place, loss in enumerate(losses, 1))


def _bar(place: int, height: float) -> str:
    kind, y = ("better", MIDDLE - height) if height > 0 else ("worse", MIDDLE)
    return f'<rect class="{kind}" x="{place + 0.15}" y="{y:.2f}" width="0.7" height="{abs(height):.2f}"/>'


def detail_html(reading: Reading, place: int, palette: Palette) -> str:
    """One token in full: its losses, the router's distribution and what else was likely."""
    token = reading.tokens[place]
    head = f"<h2>Token {place + 1:,} of {len(reading.tokens):,}: <code>{escape(visible(token.text))}</code></h2>"
    after = _guesses([("Likeliest after it", token.after)])
    if token.routed is None or token.base is None or token.gain is None:
        first = "The text begins here. Nothing came before from which it could be predicted: no loss and no route."
        return f"{head}<p>{first}</p>{after}"
    costs = (
        f"<p>Loss <b>{token.routed:.3f}</b> nats with adapters, <b>{token.base:.3f}</b> by the base alone: "
        f"{_compared(token.gain, 3)}.</p>"
    )
    routed = "".join(_distribution(name, token, palette) for name in reading.layers if name in token.odds)
    others = [_named(name, token) for name in reading.layers if name not in token.odds]
    rest = f'<p class="told">Not asked of the router: {escape("; ".join(others))}.</p>' if others else ""
    places = [("In its place, with adapters", token.guesses), ("In its place, base alone", token.base_guesses)]
    guesses = _guesses([*places, ("After it, with adapters", token.after)])
    return f"{head}{costs}{routed}{rest}<h3>Likeliest tokens</h3>{guesses}"


def _named(name: str, token: Measured) -> str:
    acted = [adapter for own, adapter, _ in token.route if own == name and adapter is not None]
    return f"{name} ({', '.join(acted)}, for the whole text)" if acted else f"{name} (off)"


def _distribution(name: str, token: Measured, palette: Palette) -> str:
    chosen = {adapter for own, adapter, _ in token.route if own == name}
    layer = next((layer for layer in palette.layers if layer.name == name), None)
    colours = palette_for(palette, layer) if layer is not None else None  # None: it came after the page
    tick = '\u00a0✓<span class="hidden">, chosen</span>'
    rows = []
    for adapter, chance in sorted(token.odds[name], key=lambda pair: -pair[1]):
        mark = colours.css_class(name, adapter) if colours is not None else ""
        chose = adapter in chosen
        rows.append(
            f'<li class="odd{" chosen" if chose else ""}"><span>{escape(adapter or "none: the base alone")}'
            f'{tick if chose else ""}</span><span class="track" aria-hidden="true"><i class="{mark or "empty"}" '
            f'style="width:{chance:.2%}"></i></span><b>{_percent(chance)}</b></li>'
        )
    return f'<h3>{escape(name)}: probabilities of the router</h3><ul class="odds">{"".join(rows)}</ul>'


def _percent(chance: float) -> str:
    return "&lt;0.1%" if 0 < chance < 0.0005 else f"{chance:.1%}"


def _guesses(rows: Sequence[tuple[str, Sequence[Guess]]]) -> str:
    shown = []
    for name, guesses in rows:
        each = (f"<code>{escape(visible(guess.text))}</code> {_percent(guess.probability)}" for guess in guesses)
        shown.append(f"<dt>{name}</dt><dd>{' '.join(f'<span>{one}</span>' for one in each)}</dd>")
    return f'<dl class="guesses">{"".join(shown)}</dl>'
