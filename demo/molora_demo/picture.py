"""A measured text as a picture: the coloured tokens, the legend and the curve of their losses, on white."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from molora.colors import FILLS, INK, printable

SCALE = 2  # pixels for each unit below
WIDTH, MARGIN, LINE = 960, 32, 26
MOST_LINES = 150  # a text of line ends alone must not make a picture that no program opens
CURVE, BARS = 150, 56  # heights
PAPER, FAINT, EDGE, ROUTED, BASE, BETTER, WORSE = (
    "#ffffff", "#52525b", "#e4e4e7", "#1d4ed8", "#71717a", "#0f766e", "#c2410c"
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A token: its text, the number of its colour (None: no adapter), and its losses (None: it has none)."""

    text: str
    fill: int | None
    routed: float | None
    base: float | None


@cache
def _font(size: int, bold: bool = False) -> Any:
    import matplotlib  # DejaVu comes with it: Latin, Cyrillic, Greek, Arabic and many signs

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size * SCALE)


def draw(pieces: Sequence[Piece], legend: Sequence[tuple[str, int | None]], title: str, facts: str) -> Image.Image:
    """The picture of a text. legend: what each colour means, with its share."""
    runs, lines = _laid_out(pieces)
    words = _wrapped(facts)
    keys = _key_rows(legend)
    top = MARGIN + 34 + 20 * len(words) + 8
    text = top + 28 * len(keys) + 8
    curve = text + LINE * lines + 30
    drawn = len(pieces) > 1
    height = curve + (CURVE + BARS + 44 if drawn else 0) + MARGIN - 14
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(image)
    _write(pen, MARGIN, MARGIN - 6, title, INK[0], _font(18, bold=True))
    for number, line in enumerate(words):
        _write(pen, MARGIN, MARGIN + 26 + 20 * number, line, FAINT, _font(13))
    for number, row in enumerate(keys):
        for x, label, fill in row:
            _box(pen, x, top + 28 * number, 16, 16, FILLS[fill % len(FILLS)][0] if fill is not None else PAPER, EDGE)
            _write(pen, x + 22, top + 28 * number, label, INK[0], _font(13))
    for x, place, width, shown, fill in runs:
        y = text + LINE * place
        if fill is not None:
            _box(pen, x, y, width, LINE - 5, FILLS[fill % len(FILLS)][0])
        _write(pen, x, y + 2, shown, INK[0], _font(14))
    if drawn:
        _curve(image, pen, curve, pieces[1:])
    return image


def _laid_out(pieces: Sequence[Piece]) -> tuple[list[tuple[float, int, float, str, int | None]], int]:
    """(x, line, width, text, colour) of every piece, and how many lines there are."""
    runs: list[tuple[float, int, float, str, int | None]] = []
    x, line, right = float(MARGIN), 0, WIDTH - MARGIN
    for piece in pieces:
        for part, ends in _parts(printable(piece.text).replace("\t", "    ")):
            width = _width(part, _font(14)) if part else 5.0
            if x + width > right and x > MARGIN:
                x, line = float(MARGIN), line + 1
            if line >= MOST_LINES:
                return [*runs, (float(MARGIN), line, 0.0, "… (cut)", None)], line + 1
            runs.append((x, line, width, part, piece.fill))
            x += width
            if ends:
                x, line = float(MARGIN), line + 1
    return runs, max((run[1] for run in runs), default=0) + 1


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a token that each fit a line, and whether a line ends after it."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        ends = number < len(lines) - 1
        if ends and not line:
            yield "⏎", True
            continue
        if not line and number:
            continue
        chunks = [line[start : start + 48] for start in range(0, len(line), 48)] or [""]
        for place, chunk in enumerate(chunks):
            yield chunk, ends and place == len(chunks) - 1


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer, _font(13)) > WIDTH - 2 * MARGIN and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _key_rows(legend: Sequence[tuple[str, int | None]]) -> list[list[tuple[float, str, int | None]]]:
    rows: list[list[tuple[float, str, int | None]]] = [[]]
    x = float(MARGIN)
    for label, fill in legend:
        width = 22 + _width(label, _font(13)) + 24
        if x + width > WIDTH - MARGIN and rows[-1]:
            rows.append([])
            x = float(MARGIN)
        rows[-1].append((x, label, fill))
        x += width
    return rows


def _curve(image: Image.Image, pen: ImageDraw.ImageDraw, y: int, pieces: Sequence[Piece]) -> None:
    """Both losses, and below them the bars of their difference: upwards where the route is better."""
    x = MARGIN
    for label, colour in (("with adapters", ROUTED), ("base alone", BASE), ("better", BETTER), ("worse", WORSE)):
        _box(pen, x, y + 6, 16, 4, colour)
        _write(pen, x + 22, y, label, INK[0], _font(13))
        x += 22 + int(_width(label, _font(13))) + 24
    y, left, right = y + 28, MARGIN + 52, WIDTH - MARGIN
    routed, base = [piece.routed or 0.0 for piece in pieces], [piece.base or 0.0 for piece in pieces]
    top = max(1, ceil(max(*routed, *base)))
    gains = [b - r for r, b in zip(routed, base, strict=True)]
    most, middle, step = max(0.1, *map(abs, gains)), y + CURVE + BARS // 2, (right - left) / len(pieces)
    for height, label in ((y, f"{top} nats"), (y + CURVE, "0"), (middle, f"±{most:.1f}")):
        pen.line([_at(left, height), _at(right, height)], EDGE, SCALE)
        _write(pen, MARGIN, height - 7, label, FAINT, _font(11))
    for place, gain in enumerate(gains):
        begin, high = left + step * place, gain / most * (BARS / 2 - 4)
        low, up = sorted((middle, middle - high))
        corners = (*_at(begin + step * 0.15, low), *_at(begin + step * 0.85, up))
        pen.rectangle(corners, BETTER if gain > 0 else WORSE if gain < 0 else EDGE)
    # Pillow's lines have hard steps: they are drawn three times as large, and the mask shrunk.
    for losses, colour in ((base, BASE), (routed, ROUTED)):
        wide, high_px, thick = int((right - left) * SCALE), (CURVE + 4) * SCALE, 3
        mask = Image.new("L", (wide * thick, high_px * thick))
        scale = SCALE * thick
        points = [
            ((step * (place + 0.5)) * scale, (2 + CURVE * (1 - loss / top)) * scale)
            for place, loss in enumerate(losses)
        ]
        ImageDraw.Draw(mask).line(points, 255, 2 * scale - 3, joint="curve")
        image.paste(colour, (left * SCALE, (y - 2) * SCALE), mask.resize((wide, high_px), Image.Resampling.BOX))


def _at(x: float, y: float) -> tuple[float, float]:
    return x * SCALE, y * SCALE


def _width(text: str, font: Any) -> float:
    return float(font.getlength(text)) / SCALE


def _write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, font: Any) -> None:
    pen.text(_at(x, y), text, colour, font)


def _box(
    pen: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, colour: str, edge: str | None = None
) -> None:
    pen.rectangle((*_at(x, y), *_at(x + width - 0.5, y + height)), colour, edge)
