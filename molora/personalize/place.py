"""A generated adapter takes its place in a saved MoLoRA: a new version, which serves from the next load on."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora import MoLoRAModel, Router, Stack
from molora.errors import StackError
from molora.factors import Factors, write_factors
from molora.saved import read_manifest
from molora.stack import check_name
from molora.versions import Version, Versions


def place(
    saved: Path,
    model: MoLoRAModel,
    label: tuple[str, str],
    factors: Factors,
    about: Mapping[str, Any],
    *,
    command: str | None = None,
    examples: Sequence[str] | None = None,
) -> Version:
    """Writes the adapter and promotes it.

    Args:
        saved: the folder.
        model: what it holds, loaded; it may be changed.
        label: the layer and the adapter's name. One that is there already gets a new version.
        factors: of the adapter.
        about: how it was made; no text of anybody's.
        command: what made it.
        examples: texts of its data, for a new one that the router is to find: see :meth:`MoLoRAModel.add_adapter`.

    Raises:
        StackError: there is no such layer, or a name is none.
    """
    layer, name = check_label(saved, label)
    new = name not in model.stack[layer].adapters
    versions = Versions(saved, layer, name)
    with tempfile.TemporaryDirectory(prefix="molora-") as scratch:
        folder = Path(scratch) / name
        write_factors(folder, factors, str(model.base_name), about)
        version = versions.add(folder, command=command, data=about)
        router = None
        if new and isinstance(model.router, Router) and model.stack[layer].routed:
            model.add_adapter(layer, name, folder, examples=examples)
            router = model.router.cpu()
    versions.promote(version.number, router=router)
    return version


def check_label(saved: Path, label: tuple[str, str]) -> tuple[str, str]:
    """Whether a saved MoLoRA has room for an adapter of that name.

    Raises:
        StackError: there is no such layer, or a name is none.
    """
    layer, name = label
    check_name(layer, "a layer")
    check_name(name, "an adapter")
    stack = Stack.from_dict(read_manifest(saved)["stack"], saved)
    known = [one.name for one in stack.layers]
    if layer not in known:
        raise StackError(f"{saved} has no layer {layer!r}: it has {', '.join(known)}.")
    return layer, name
