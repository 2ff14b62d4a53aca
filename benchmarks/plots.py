"""Draws what the GPU benchmarks measured, as SVG.

    python -m benchmarks.plots runs/gpu --out runs/gpu                 # from step.json and kernels.csv
    python -m benchmarks.plots docs/results/kernels.json --out FOLDER  # from the gathered report

kernels-layer.svg: microseconds that adapters add to a layer's products against tokens, for each contender.
kernels-decode.svg: milliseconds that they add to a whole decode step against the number of adapters.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.results import gather
from tools.pictures import PALETTE, pyplot, save

LAYER, DECODE = "kernels-layer.svg", "kernels-decode.svg"
NOT_CONTENDERS = (
    "what",
    "commit",
    "shape",
    "adapters",
    "tokens",
    "top",
    "rank",
    "popularity",
    "order",
    "base",
    "limit",
)

Row = dict[str, Any]


def contenders(rows: list[Row]) -> list[str]:
    """Names of the contenders in the rows of a layer's kernels, in order."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NOT_CONTENDERS]


def pictures(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each picture that there are rows for, by its name: of the shape and rank that was measured most."""
    layer = [row for row in rows if row["what"] == "layer" and (row["top"], row["popularity"]) == (1, "uniform")]
    decode = [row for row in rows if row["what"] == "decode" and "adapters" in row]
    chosen = {}
    for name, own in ((LAYER, layer), (DECODE, decode)):
        if own:
            kinds = Counter((row["shape"], row["rank"]) for row in own)
            chosen[name] = [row for row in own if (row["shape"], row["rank"]) == kinds.most_common(1)[0][0]]
    return chosen


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draws the pictures; their files."""
    chosen = pictures(rows)
    for name, own in chosen.items():
        (draw_layer if name == LAYER else draw_decode)(own, folder / name)
    return [folder / name for name in chosen]


def draw_layer(rows: list[Row], file: Path) -> None:
    """A panel for each number of adapters; lines over tokens, the limit dashed."""
    counts = sorted({row["adapters"] for row in rows})
    figure, panels = pyplot().subplots(1, len(counts), figsize=(1 + 3.2 * len(counts), 3.8), sharey=True, squeeze=False)
    names = contenders(rows)
    for axes, count in zip(panels[0], counts, strict=True):
        own = sorted((row for row in rows if row["adapters"] == count), key=lambda row: row["tokens"])
        for index, name in enumerate(names):
            points = [(row["tokens"], row[name]) for row in own if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_color(index), label=name)
        axes.plot([row["tokens"] for row in own], [row["limit"] for row in own], "k--", linewidth=0.8, label="limit")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{count} adapters, rank {own[0]['rank']}")
        _ticks(axes, [row["tokens"] for row in own])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("added to a layer, µs")
    lines = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, file, bottom=0.14)


def draw_decode(rows: list[Row], file: Path) -> None:
    """A line over the number of adapters for each batch; top-2 dashed."""
    figure, axes = pyplot().subplots(figsize=(6, 3.6))
    batches, styles = sorted({row["batch"] for row in rows}), {1: "-", 2: "--"}
    for (batch, top), index in {(row["batch"], row["top"]): batches.index(row["batch"]) for row in rows}.items():
        own = sorted((row["adapters"], row["added_ms"]) for row in rows if (row["batch"], row["top"]) == (batch, top))
        axes.plot(
            *zip(*own, strict=True), styles.get(top, ":"), marker="o", markersize=3, color=_color(index),
            label=f"batch {batch}, top-{top}",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="adapters", ylabel="added to a decode step, ms")
    _ticks(axes, sorted({row["adapters"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def _ticks(axes: Any, values: list[int]) -> None:
    """Those that were measured, on a logarithmic axis."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder that the benchmarks wrote, or a gathered report")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the pictures")
    settings = parser.parse_args()
    try:
        report = gather(settings.source) if settings.source.is_dir() else json.loads(settings.source.read_text())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    drawn = draw(report["rows"], settings.out)
    print("\n".join(map(str, drawn)) if drawn else "There is nothing to draw: no rows of a layer or of a decode step.")


if __name__ == "__main__":
    main()
