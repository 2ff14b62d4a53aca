"""One control for each layer of the stack: which adapters may act, and how strongly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from molora.selection import Choice
from molora.stack import AUTO, NONE, StackLayer

MOST_STRENGTH = 2.0


def settle(values: Sequence[str]) -> list[str]:
    """What a multiple choice shows after a click: the last pick wins where "auto" or "none" meets names.

    A browser appends each new pick to the end; an empty choice is "none".
    """
    if not values:
        return [NONE]
    if values[-1] in (AUTO, NONE):
        return [values[-1]]
    return [value for value in values if value not in (AUTO, NONE)]


def choice(value: Sequence[str], strength: float = 1.0, decided: bool = True) -> Choice:
    """A control's value as a selection's.

    Args:
        value: "auto", "none" or names.
        strength: that named adapters act with; another one than 1 makes several act at once.
        decided: whether the router (or the question, in a keyed layer) can choose among several names; where it cannot
            all of them act at once.
    """
    names = settle(value)
    if names[0] == NONE:
        return None
    if names[0] == AUTO:
        return AUTO
    if strength != 1.0 or (len(names) > 1 and not decided):
        return dict.fromkeys(names, float(strength))
    return names if len(names) > 1 else names[0]


def is_decided(layer: StackLayer, has_router: bool) -> bool:
    """Whether "auto" may be offered: the stack's maker leaves the layer to the router, or its keys decide."""
    return layer.default == AUTO and (has_router or layer.keyed)


def offered(layer: StackLayer, has_router: bool, adapters: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(shown, meant) of everything in a layer's control; ``adapters``: what this browser may name."""
    auto = [("auto", AUTO)] if is_decided(layer, has_router) else []
    return [*auto, ("none", NONE), *adapters]


@dataclass(frozen=True)
class Controls:
    """Of all layers, in the stack's order."""

    layers: Sequence[StackLayer]
    has_router: bool
    names: list[gr.Dropdown]
    strengths: list[gr.Slider]

    @property
    def inputs(self) -> list[Any]:
        return [*self.names, *self.strengths]

    def selection(self, values: Sequence[Any]) -> dict[str, Choice]:
        """What the values of ``inputs`` mean."""
        count = len(self.layers)
        return {
            layer.name: choice(names, strength, is_decided(layer, self.has_router))
            for layer, names, strength in zip(self.layers, values[:count], values[count:], strict=True)
        }


def build(layers: Sequence[StackLayer], has_router: bool) -> Controls:
    """The controls, where Gradio is putting things now."""
    names = [_names(layer, has_router) for layer in layers]
    with gr.Accordion("Strengths", open=False):
        gr.Markdown("Of adapters that you name; 1 is as trained. At any other strength several names act at once.")
        strengths = [_strength(layer) for layer in layers]
    return Controls(layers, has_router, names, strengths)


def title(layer: StackLayer) -> str:
    return layer.name.replace("_", " ").capitalize()


def refreshed(controls: Controls, adapters: Sequence[Sequence[tuple[str, str]]], picked: Sequence[Any]) -> list[Any]:
    """Updates of ``controls.names`` with what there is now; a pick that has gone is taken back.

    Args:
        adapters: (shown, meant) of what this browser may name, by layer. picked: the controls' values.
    """
    updates = []
    for layer, own, value in zip(controls.layers, adapters, picked, strict=True):
        choices = offered(layer, controls.has_router, own)
        there = {meant for _, meant in choices}
        updates.append(gr.update(choices=choices, value=settle([name for name in value if name in there])))
    return updates


def _names(layer: StackLayer, has_router: bool) -> gr.Dropdown:
    decided = is_decided(layer, has_router)
    if decided:
        picks = "the question picks one for the answer" if layer.keyed else "the router picks for every token"
        value, info = AUTO, f"auto: {picks}. Several names: it picks among these."
    else:
        value = layer.default if layer.default in layer.adapters else NONE
        info = "Several names: all of them act at once."
    names = [(name, name) for name in layer.adapters]
    control = gr.Dropdown(
        offered(layer, has_router, names),
        value=[value],
        multiselect=True,
        label=title(layer),
        info=info,
    )
    control.input(settle, control, control, queue=False, show_progress="hidden", api_visibility="private")
    return control


def _strength(layer: StackLayer) -> gr.Slider:
    return gr.Slider(0, MOST_STRENGTH, value=1.0, step=0.1, label=f"{title(layer)} strength", buttons=[])
