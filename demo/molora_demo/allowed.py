"""Which adapters a browser's selection may mean: what is public, and what it taught itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from molora.errors import MoLoRAError, SelectionError
from molora.selection import Choice
from molora.stack import AUTO, StackLayer
from molora_demo.private import Private
from molora_demo.shelf import Lesson


class Allowed:
    """Args:
    model: of it are needed ``stack``, ``router`` and, with keyed layers, ``keys``.
    private: who knows what is not public.
    """

    def __init__(self, model: Any, private: Private) -> None:
        self.model, self.private = model, private

    def __call__(self, selection: Mapping[str, Choice], own: Sequence[Lesson]) -> dict[str, Choice]:
        """``selection`` with every "auto", also where it is a default, as a list of names.

        Raises:
            MoLoRAError: a name is neither public nor in ``own``, or what it names is damaged.
        """
        found = dict(selection)
        for layer in self.model.stack.layers:
            choice = selection.get(layer.name, layer.default)
            if layer.name in selection or (choice == AUTO and self._told(layer)):
                mine = {one.name: one for one in own if one.layer == layer.name}
                found[layer.name] = self._choice(layer, choice, mine)
        return found

    def _told(self, layer: StackLayer) -> bool:
        """Whether anything can decide there."""
        return self.model.router is not None or layer.keyed

    def _choice(self, layer: StackLayer, choice: Choice, mine: Mapping[str, Lesson]) -> Choice:
        if choice is None:
            return None
        if choice == AUTO:
            return self._auto(layer, mine)
        if not isinstance(choice, str | Mapping | Sequence):
            raise SelectionError(f"Layer {layer.name!r}: this is no choice.")
        named: list[Any] = [choice] if isinstance(choice, str) else list(choice)
        public = self.private.public(layer)
        for name in named:
            if name not in public and name not in mine:  # also what another browser taught: nobody is told that it is
                known = ", ".join([*public, *(f"“{one.title}”" for one in mine.values())]) or "none at all"
                raise SelectionError(f"Layer {layer.name!r} has no adapter {str(name)[:80]!r}; it has {known}.")
        if not isinstance(choice, str | Mapping):
            if layer.keyed and any(name in mine for name in named):
                raise SelectionError(f"Layer {layer.name!r}: choose what you taught alone; no question finds it.")
            if layer.shared and len(set(named)) > 1:
                raise _undecided(layer)
        for name in named:
            if name in mine:
                self.private.bring(layer.name, name, mine[name].folder)
        return choice

    def _auto(self, layer: StackLayer, mine: Mapping[str, Lesson]) -> Choice:
        public = self.private.public(layer)
        if not self._told(layer):
            return AUTO  # it is refused by the model, in its own words
        if layer.shared:
            if len(names := [*public, *mine]) > 1:
                raise _undecided(layer)
            return self._choice(layer, names, mine) if names else None
        if layer.keyed:  # private ones have no keys
            return [name for name in public if self.model.keys.of(layer.name, name) is not None]
        found = list(public)
        for name, lesson in mine.items():
            if not lesson.row.is_file():
                continue  # it acts when it is named
            try:
                self.private.bring(layer.name, name, lesson.folder)
            except MoLoRAError:
                continue  # damaged: who names it is told
            found.append(name)
        return found


def _undecided(layer: StackLayer) -> SelectionError:
    return SelectionError(f"Layer {layer.name!r}: the router cannot tell its adapters apart; choose one.")
