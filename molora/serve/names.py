"""OpenAI's ``model`` as a selection, and which adapters a key may name.

The adapters of a shared layer are one for each user, and their names are private: no message and no list tells them,
and to a user's key those of others are as if they were not there.
"""

from collections.abc import Collection, Mapping
from typing import Any

from molora.errors import RequestError
from molora.selection import Choice
from molora.stack import AUTO, Stack, StackLayer, check_name

BASE, DEFAULTS = "base", "molora"


class UnknownNameError(RequestError):
    """There is no such model, layer or adapter for who asks."""


def parse_model(
    name: str, stack: Stack, base_name: str, user: str | None = None, pooled: Collection[str] = ()
) -> dict[str, Choice]:
    """The selection that a model's name stands for.

    "molora": the stack's defaults. "base", or the base's own name: no adapter. Parts are added to either of them with
    "+": "auto" leaves what no part names to the router, "layer/name" forces an adapter, and so does a name alone where
    one layer has it. Several adapters of a layer act together.

    Args:
        name: as in a request.
        stack: the model's.
        base_name: the base's own name.
        user: whose adapters may be named in shared layers; None: everybody's.
        pooled: layers that look for an adapter when it is asked for, as "layer/name": it need not be there yet.

    Raises:
        UnknownNameError: something of that name is not there. RequestError: a name that two layers have.
    """
    head, *parts = (BASE + name[len(base_name) :] if _starts(name, base_name) else name).split("+")
    if head not in (BASE, DEFAULTS):
        raise UnknownNameError(
            f"There is no model {name!r}. Ask for 'molora', 'base', or 'base+LAYER/ADAPTER+...'; "
            f"{_known(stack.layers)}."
        )
    named: dict[str, list[str]] = {}
    for part in parts:
        if part != AUTO:
            layer, adapter = _find(part, stack, user, pooled)
            named.setdefault(layer.name, []).append(adapter)
    selection: dict[str, Choice] = {} if head == DEFAULTS else {layer.name: None for layer in stack.layers}
    if AUTO in parts:
        selection |= {layer.name: AUTO for layer in stack.layers if not layer.shared}
    for of, names in named.items():
        selection[of] = names[0] if len(set(names)) == 1 else dict.fromkeys(names, 1.0)
    return confine(selection, stack, user, pooled)


def confine(
    selection: Mapping[str, Any], stack: Stack, user: str | None = None, pooled: Collection[str] = ()
) -> dict[str, Choice]:
    """``selection``, checked to name only what is there for ``user``, and without another user's default.

    Raises:
        UnknownNameError: it names something else. RequestError: the router shall choose among users.
    """
    for of, choice in selection.items():
        layer = next((one for one in stack.layers if one.name == of), None)
        if layer is None:
            raise UnknownNameError(f"There is no layer {of!r}; {_known(stack.layers)}.")
        if layer.shared and choice == AUTO:
            raise RequestError(f"The router cannot tell users apart: name the adapter of layer {of!r}, or leave it.")
        for name in _names(choice):
            if not _visible(layer, name, user, pooled):
                raise UnknownNameError(_missing(layer, name))
    hidden = [
        layer.name
        for layer in stack.layers
        if layer.shared and layer.default is not None and not _visible(layer, layer.default, user)
    ]
    return dict.fromkeys(hidden) | dict(selection)


def told_adapters(layer: StackLayer, user: str | None = None) -> list[str]:
    """The adapters of a layer that ``user`` may be told; those of a shared layer are private."""
    return list(layer.adapters) if not layer.shared else [user] if user in layer.adapters else []


def models(stack: Stack, user: str | None = None) -> list[str]:
    """The names of models that ``user`` may be told."""
    names = [DEFAULTS, BASE]
    for layer in stack.layers:
        names += [f"{BASE}+{layer.name}/{name}" for name in told_adapters(layer, user)]
    return names


def _starts(name: str, base_name: str) -> bool:
    """A base's own name may hold a "+" itself."""
    return name == base_name or name.startswith(f"{base_name}+")


def _find(part: str, stack: Stack, user: str | None, pooled: Collection[str]) -> tuple[StackLayer, str]:
    of, slash, adapter = part.partition("/")
    if slash:
        layer = next((one for one in stack.layers if one.name == of), None)
        if layer is None:
            raise UnknownNameError(f"There is no layer {of!r}; {_known(stack.layers)}.")
        if not _visible(layer, adapter, user, pooled):
            raise UnknownNameError(_missing(layer, adapter))
        return layer, adapter
    found = [layer for layer in stack.layers if _visible(layer, part, user)]
    if len(found) > 1:
        where = ", ".join(repr(f"{layer.name}/{part}") for layer in found)
        raise RequestError(f"{part!r} is in several layers: write {where}.")
    if not found:
        raise UnknownNameError(f"There is no such adapter: {part!r}; {_known(stack.layers)}.")
    return found[0], part


def _visible(layer: StackLayer, name: str, user: str | None, pooled: Collection[str] = ()) -> bool:
    if name not in layer.adapters:
        if layer.name not in pooled:
            return False
        check_name(name, "an adapter")  # it is looked for in a store
    return not layer.shared or user in (None, name)


def _names(choice: Any) -> list[str]:
    if choice is None or choice == AUTO:
        return []
    return [choice] if isinstance(choice, str) else [str(name) for name in choice]


def _missing(layer: StackLayer, name: str) -> str:
    if layer.shared:
        return f"There is no such adapter: {layer.name}/{name!r}."
    return f"Layer {layer.name!r} has no adapter {name!r}; it has {', '.join(list(layer.adapters)) or 'none at all'}."


def _known(layers: list[StackLayer]) -> str:
    told = [f"{layer.name}/{name}" for layer in layers if not layer.shared for name in list(layer.adapters)]
    return f"the layers are {', '.join(layer.name for layer in layers)}, the adapters {', '.join(told) or 'none'}"
