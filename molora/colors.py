"""Who spoke each token, and in which colour that is shown. Pure functions of routes and stack layers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from molora.stack import AUTO, StackLayer

Route: TypeAlias = Sequence[tuple[str, str | None, float]]
"""(layer, adapter or None, weight) of every adapter that acted on a token."""

FILLS = (
    ("#84b9fb", "#1e6caa"),
    ("#cfb464", "#846224"),
    ("#cef9c8", "#144b34"),
    ("#eb9ecf", "#9f4c75"),
    ("#f0e49a", "#3b3573"),
    ("#1ce7fa", "#512c4d"),
    ("#acbd86", "#633004"),
    ("#91c0a7", "#586f46"),
)
"""Backgrounds (light, dark) of a layer's adapters, in order; more adapters go round again."""
INK = ("#18181b", "#f4f4f5")
"""Text (light, dark) on these backgrounds, with a contrast of 5 or more."""


def speaking_layer(layers: Sequence[StackLayer]) -> StackLayer:
    """The layer whose adapters colour a text where one layer is shown: the first that the router decides by default,
    else the first that is not shared."""
    routed = [layer for layer in layers if layer.default == AUTO]
    told = [layer for layer in layers if not layer.shared]
    return (routed or told or list(layers))[0]


def fill_of(layer: StackLayer, adapter: str | None) -> int | None:
    """Which of :data:`FILLS` an adapter has, fixed by its place in the layer; None for no adapter."""
    return None if adapter is None else list(layer.adapters).index(adapter) % len(FILLS)


def speaker(route: Route, layer: str) -> str | None:
    """The adapter of ``layer`` with the largest weight, None where none acted."""
    acted = [(weight, adapter) for name, adapter, weight in route if name == layer and adapter is not None]
    return max(acted, key=lambda pair: pair[0])[1] if acted else None


def shares(routes: Iterable[Route], layer: str) -> dict[str | None, float]:
    """Adapter (None: no adapter) -> part of the tokens that it spoke, largest first; the parts sum to 1."""
    counts = Counter(speaker(route, layer) for route in routes)
    return {name: count / counts.total() for name, count in counts.most_common()}


def shares_text(routes: Sequence[Route], layers: Iterable[StackLayer]) -> str:
    """ "domain math 62%, none 38%; user ada 100%", without the layers of which no adapter acted."""
    parts = []
    for layer in layers:
        found = shares(routes, layer.name)
        if set(found) - {None}:
            parts.append(f"{layer.name} " + ", ".join(f"{name or 'none'} {part:.0%}" for name, part in found.items()))
    return "; ".join(parts)


def printable(text: str) -> str:
    """``text`` without control characters, so that what a model writes cannot steer a terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
