"""SVG pictures that are the same file for the same figures."""

from pathlib import Path
from typing import Any

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "molora"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path, bottom: float = 0.0) -> None:
    """``bottom``: share of the height that is kept for a legend below the axes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(file, metadata={"Date": None})
    pyplot().close(figure)
