"""The selection that a request brings: ``SamplingParams(extra_args={"molora": {"user": "ada"}})``, or over HTTP
``"vllm_xargs": {"molora": "{\\"user\\": \\"ada\\"}"}``. Without one a stack runs under what it was exported with."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from molora.errors import SelectionError
from molora.selection import ResolvedSelection, candidates, resolve
from molora.stack import SlotTable, Stack
from molora.vllm.folder import MANIFEST, read_manifest

KEY = "molora"


def choice_of(params: Any) -> str | None:
    """The selection in a request's parameters, as JSON that is the same for the same selection; None: it has none.

    Raises:
        SelectionError: it is no JSON.
    """
    found = (getattr(params, "extra_args", None) or {}).get(KEY)
    if found is None:
        return None
    try:
        return _ordered(found) if isinstance(found, str) else json.dumps(found, sort_keys=True)
    except (ValueError, TypeError) as error:
        raise SelectionError(f"A selection maps layers to choices, as JSON; {found!r} does not ({error}).") from error


@lru_cache(maxsize=4096)  # it is asked of every request in every step
def _ordered(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


class Selections:
    """Those that an exported stack may be asked for.

    Args:
        manifest: of the folder.
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.stack = Stack.from_dict(manifest["stack"])
        self.slots = SlotTable()
        for label in self.stack.names:
            self.slots.take(label)
        self.layers = candidates(self.stack, self.slots)
        self._has_router = manifest["router"] is not None
        self._default = manifest["selection"] or {}

    def resolve(self, choice: str | None) -> ResolvedSelection:
        """One sequence's, by what :func:`choice_of` found. Layers that it leaves out are as exported.

        Raises:
            SelectionError: it does not fit the stack.
        """
        own = {} if choice is None else json.loads(choice)
        if not isinstance(own, dict):
            raise SelectionError(f"A selection maps layers to choices; {choice} does not.")
        found = resolve({**self._default, **own}, self.stack, self.layers, self._has_router)
        if found.open:
            raise SelectionError(
                f"In vLLM nothing tells by the question what acts in layer {found.open[0]!r}: name an adapter, or None."
            )
        return found


def check_choice(choice: str, folder: Path | None) -> None:
    """Raises SelectionError where a request's selection is not for the stack in ``folder`` (None: the base)."""
    if folder is None or not (folder / MANIFEST).is_file():
        raise SelectionError("A selection was given for a model that is no routed stack: ask for one by its name.")
    _selections(folder).resolve(choice)


@lru_cache(maxsize=64)
def _selections(folder: Path) -> Selections:
    return Selections(read_manifest(folder))
