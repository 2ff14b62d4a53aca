"""How a decode step's products are cut on a GPU: measured by ``benchmarks/tune.py``, which writes ``tiles.json``.

Each entry of ``linear``: tokens, rows and columns of W, and the tile that was fastest there. A product that was not
measured takes the tile of the nearest one that was. ``attention``: sequences times heads of the cache, likewise.
``shrink`` and ``expand``: tokens and slots of the forms by block. ``epilogue``: the same, and columns of the plan, of
what stands between products. ``hot``: tokens and ranks of all adapters of a group,
and whether to multiply all of them. ``forms``, written by ``benchmarks/forms.py``: the time of a form at a size, and of
the other one.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from molora_kernels.attention import AttentionTile
from molora_kernels.expand import ExpandTile
from molora_kernels.linear import LinearTile
from molora_kernels.shrink import ShrinkTile


@dataclass(frozen=True)
class EpilogueTile:
    """How the kernels between products are cut that take many tokens: tokens, slots at once, warps, and pipeline stages
    of the loop over further slots (registers are fewer where most blocks have none)."""

    t: int = 64
    at_once: int = 1
    warps: int = 4
    stages: int = 1


LARGEST_HOT = 4096  # ranks of all slices and pages that are ever multiplied for every token


@cache
def _table() -> dict[str, Any]:
    return json.loads(resources.files("molora_kernels").joinpath("tiles.json").read_text())


@cache
def linear_tile(tokens: int, rows: int, columns: int) -> LinearTile:
    """The tile for ``tokens`` tokens and a weight of ``rows`` by ``columns``."""

    def distance(entry: dict[str, Any]) -> tuple[bool, float]:
        away = 2 * _octaves(entry["tokens"], tokens)
        away += _octaves(entry["rows"], rows) + _octaves(entry["columns"], columns)
        return (entry["tokens"] == 1) != (tokens == 1), away  # one token is multiplied another way

    return LinearTile(**min(_table()["linear"], key=distance)["tile"])


@cache
def attention_tile(batch: int, kv_heads: int, longest: int) -> AttentionTile:
    """The tile for ``batch`` sequences, so many heads of the cache, and up to ``longest`` positions."""
    entry = min(_table()["attention"], key=lambda entry: _octaves(entry["programs"], batch * kv_heads))
    tile = AttentionTile(**entry["tile"])
    most = max(1, longest // tile.block)  # no more parts than blocks
    return replace(tile, parts=min(tile.parts, 1 << (most.bit_length() - 1)))


@cache
def shrink_tile(tokens: int, slots: int) -> ShrinkTile:
    """The tile of the form by block for ``tokens`` tokens over ``slots`` slots."""
    return ShrinkTile(**_by_tokens("shrink", tokens, slots))


@cache
def expand_tile(tokens: int, slots: int) -> ExpandTile:
    """As :func:`shrink_tile`."""
    return ExpandTile(**_by_tokens("expand", tokens, slots))


@cache
def epilogue_tile(tokens: int, slots: int, top: int) -> EpilogueTile:
    """The tile of the kernels between products for ``tokens`` tokens over ``slots`` slots (0: none), top-``top``."""
    entries = [entry for entry in _table()["epilogue"] if entry["top"] == min(top, 2)]
    best = min(entries, key=lambda entry: _octaves(entry["tokens"], tokens) + _octaves(entry["slots"], max(1, slots)))
    return EpilogueTile(**best["tile"])


@cache
def hot(tokens: int, rows: int) -> bool:
    """Whether a prompt's shrink is the product with all ``rows`` ranks of the adapters, rather than by block."""
    if rows > LARGEST_HOT:
        return False
    entries = _table()["hot"]
    return min(entries, key=lambda e: _octaves(e["tokens"], tokens) + _octaves(e["rows"], rows))["hot"]


def fastest_up_to(form: str) -> int:
    """The largest size up to which a form was faster than the other, by more than two runs differ; 0: at none."""
    most = 0
    for entry in sorted((e for e in _table()["forms"] if e["form"] == form), key=lambda e: e["size"]):
        if entry["us"] > 0.98 * entry["other_us"]:
            break
        most = entry["size"]
    return most


def _by_tokens(kind: str, tokens: int, slots: int) -> dict[str, int]:
    def away(entry: dict[str, Any]) -> float:
        return _octaves(entry["tokens"], tokens) + _octaves(entry["slots"], slots)

    return min(_table()[kind], key=away)["tile"]


def _octaves(one: int, other: int) -> float:
    return abs(math.log2(one / other))
