"""How a decode step's products are cut on a GPU: measured by ``benchmarks/tune.py``, which writes ``tiles.json``.

Each entry: tokens (up to so many), rows and columns of W, and the tile that was fastest there. A product that was not
measured takes the tile of the nearest one that was.
"""

import json
import math
from functools import cache
from importlib import resources

from molora_kernels.linear import LinearTile


@cache
def _measured() -> list[tuple[int, int, int, LinearTile]]:
    table = json.loads(resources.files("molora_kernels").joinpath("tiles.json").read_text())
    return [(e["tokens"], e["rows"], e["columns"], LinearTile(**e["tile"])) for e in table["linear"]]


@cache
def linear_tile(tokens: int, rows: int, columns: int) -> LinearTile:
    """The tile for ``tokens`` tokens and a weight of ``rows`` by ``columns``."""

    def distance(entry: tuple[int, int, int, LinearTile]) -> tuple[bool, float]:
        t, n, k, _ = entry
        away = 2 * abs(math.log2(t / tokens)) + abs(math.log2(n / rows)) + abs(math.log2(k / columns))
        return (t == 1) != (tokens == 1), away  # one token is multiplied another way

    return min(_measured(), key=distance)[3]
