"""The stack: an ordered list of layers of adapters, and the slot that each adapter has at run time."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from molora.errors import StackError

AUTO = "auto"
NONE = "none"
ROUTERS = "_routers"  # the layer of a store's routers: none of a stack can have this name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_name(name: object) -> TypeGuard[str]:
    """Whether it may name a layer or an adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    return not name.endswith(".") and name.lower() not in (AUTO, NONE)


def check_name(name: object, what: str) -> str:
    """Names become folder names and parts of route labels, so they are never paths.

    Raises:
        StackError: it is not a plain name.
    """
    if not is_name(name):
        raise StackError(
            f"{name!r} cannot name {what}: use 1 to 64 letters, digits, '_', '-' or '.', "
            f"beginning with a letter or digit, and neither 'auto' nor 'none'."
        )
    return name


def read_label(text: str) -> tuple[str, str]:
    """``user/ada`` in its two parts.

    Raises:
        StackError: it is not of that form.
    """
    layer, slash, name = text.partition("/")
    if not slash:
        raise StackError(f"{text!r} does not say where it belongs: write LAYER/NAME, such as user/ada.")
    return check_name(layer, "a layer"), check_name(name, "an adapter")


@dataclass
class StackLayer:
    """One layer of a stack, of which at most ``top_k`` adapters act on a token.

    Args:
        name: "personality", "domain", "user" or any other.
        adapters: name -> PEFT folder (or Hub id).
        top_k: how many of the layer's adapters the router may choose for one token.
        default: what a selection means that does not mention this layer: "auto", a name or None.
        shared: the router has one row for every adapter of the layer (users: who speaks is told, not guessed).
        keyed: the router has none for it: "auto" is one adapter for a question as a whole, told by keys that are not
            trained (:mod:`molora.keys`).
    """

    name: str
    adapters: dict[str, Any] = field(default_factory=dict)
    top_k: int = 1
    default: str | None = AUTO
    shared: bool = False
    keyed: bool = False

    def __post_init__(self) -> None:
        check_name(self.name, "a layer")
        if not isinstance(self.adapters, Mapping):
            raise StackError(f"Layer {self.name!r}: adapters must map names to folders.")
        self.adapters = {check_name(name, "an adapter"): path for name, path in self.adapters.items()}
        if not all(isinstance(path, str | Path) and str(path) for path in self.adapters.values()):
            raise StackError(f"Layer {self.name!r}: adapters must map names to folders.")
        if not isinstance(self.shared, bool):
            raise StackError(f"Layer {self.name!r}: shared must be true or false, not {self.shared!r}.")
        if not isinstance(self.keyed, bool):
            raise StackError(f"Layer {self.name!r}: keyed must be true or false, not {self.keyed!r}.")
        if self.keyed and (self.shared or self.top_k != 1):
            raise StackError(f"Layer {self.name!r} is keyed, so it cannot be shared, and its top_k is 1.")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise StackError(f"Layer {self.name!r}: top_k must be a whole number from 1, not {self.top_k!r}.")
        if self.shared and self.default == AUTO:
            self.default = None
        if self.default not in (AUTO, None) and self.default not in list(self.adapters):
            raise StackError(f"Layer {self.name!r}: its default {self.default!r} is none of its adapters.")

    @property
    def routed(self) -> bool:
        """Whether each of its adapters has a row of the router for itself."""
        return not (self.shared or self.keyed)


class Stack:
    """An ordered list of layers.

    Args:
        layers: at least one, with different names.
    """

    def __init__(self, layers: list[StackLayer]) -> None:
        if not layers:
            raise StackError("A stack needs at least one layer.")
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names):
            raise StackError(f"Layers need different names, not {names}.")
        self.layers = list(layers)

    def __getitem__(self, name: str) -> StackLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise StackError(f"There is no layer {name!r}; the stack has {', '.join(layer.name for layer in self.layers)}.")

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    def __repr__(self) -> str:
        return "Stack(" + "; ".join(f"{layer.name}: {', '.join(layer.adapters) or '-'}" for layer in self.layers) + ")"

    @property
    def names(self) -> list[str]:
        """ "layer/adapter" of every adapter, in order."""
        return [f"{layer.name}/{adapter}" for layer in self.layers for adapter in layer.adapters]

    @classmethod
    def from_dict(cls, data: Any, folder: Path | None = None) -> "Stack":
        """From the form in stack.yaml and molora.json; relative adapter paths are taken from ``folder``.

        Raises:
            StackError: a key is unknown, a value has the wrong type, or a folder of adapters holds none.
            AdapterFormatError: a compressed store is damaged.
        """
        if not isinstance(data, Mapping) or set(data) != {"layers"} or not isinstance(data["layers"], list):
            raise StackError("A stack is {layers: [{name: ..., adapters: {...}}, ...]} and nothing else.")
        layers = []
        for entry in data["layers"]:
            known = {"name", "adapters", "top_k", "default", "shared", "keyed"}
            if not isinstance(entry, Mapping) or "name" not in entry or set(entry) - known:
                raise StackError(f"A layer has the keys {', '.join(sorted(known))}, not {entry!r}.")
            entry = dict(entry)
            adapters = entry.pop("adapters", None) or {}
            if isinstance(adapters, str):
                adapters = _all_in((folder or Path()) / adapters)
            if not isinstance(adapters, Mapping) or not all(isinstance(path, str) for path in adapters.values()):
                raise StackError(f"Layer {entry['name']!r}: adapters map names to folders, or are a folder's.")
            if folder is not None:
                adapters = {name: _locate(folder, path) for name, path in adapters.items()}
            layers.append(StackLayer(adapters=dict(adapters), **entry))
        return cls(layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "name": layer.name,
                    "top_k": layer.top_k,
                    "default": layer.default,
                    "shared": layer.shared,
                    **({"keyed": True} if layer.keyed else {}),
                    "adapters": {name: str(path) for name, path in layer.adapters.items()},
                }
                for layer in self.layers
            ]
        }

    @classmethod
    def load(cls, file: str | Path) -> "Stack":
        """Reads stack.yaml; relative paths in it are taken from its folder."""
        path = Path(file)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StackError(f"{file} is not a readable stack file ({error}).") from error
        return cls.from_dict(data, path.parent)

    def save(self, file: str | Path) -> None:
        Path(file).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def _all_in(folder: Path) -> dict[str, str]:
    """Every adapter of a compressed store, or of a folder of PEFT folders, which are named as they are."""
    if (folder / "store.json").is_file():
        from molora.compose.store import CompressedStore

        store = CompressedStore.load(folder)
        return {name: str(store.path(name)) for name in store.names}
    found = {file.parent.name: str(file.parent) for file in sorted(folder.glob("*/adapter_config.json"))}
    found = {name: path for name, path in found.items() if not name.startswith(".")}
    if not found:
        raise StackError(f"{folder} holds no adapters: it has neither PEFT folders nor what `molora compress` writes.")
    return found


def _locate(folder: Path, path: Any) -> str:
    local = folder / str(path)
    return str(local) if local.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else str(path)


class SlotTable:
    """Which slot each adapter has: stable while it stays, so that a plan never names another adapter."""

    def __init__(self) -> None:
        self._names: list[str] = []  # by slot, "" where it is free
        self._slots: dict[str, int] = {}
        self._free: list[int] = []  # a heap

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> int:
        return self._slots[name]

    def of(self, names: Sequence[str]) -> list[int]:
        """Of many at once."""
        return list(map(self._slots.__getitem__, names))

    def take(self, name: str) -> int:
        if not self._free:
            self._free.append(len(self._names))
            self._names.append("")
        slot = heappop(self._free)
        self._names[slot], self._slots[name] = name, slot
        return slot

    def free(self, name: str) -> int:
        slot = self._slots.pop(name)
        self._names[slot] = ""
        heappush(self._free, slot)
        return slot

    @property
    def names(self) -> list[str]:
        return list(self._names)
