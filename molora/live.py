"""Adapters in and out of a stack that runs, and what they are found by there. See the methods of
:class:`molora.model.MoLoRAModel`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from molora.adapter import Adapter
from molora.atomic import remove_folder
from molora.checks import check_fits
from molora.errors import StackError
from molora.examples import encode_examples, fit_row, questions_of
from molora.loading import load_adapter
from molora.packed import Packed
from molora.router import Router
from molora.selection import router_rows
from molora.stack import StackLayer, check_name
from molora.vocabulary import VocabularyRouter

if TYPE_CHECKING:
    from molora.compose.merge import MergeReport
    from molora.model import MoLoRAModel


def add(
    model: "MoLoRAModel", layer: str, name: str, path: str | Path | Adapter | Packed, examples: Sequence[str] | None
) -> None:
    check_name(name, "an adapter")
    own = model.stack[layer]
    if name in own.adapters:
        raise StackError(f"Layer {layer!r} already has an adapter {name!r}: use replace_adapter.")
    packed = _load(model, path)
    encoded = encode_examples(model, examples, own.keyed) if examples is not None else []
    with model.routing.lock, _whole_or_not_at_all(model, own, name):
        own.adapters[name] = path if isinstance(path, str | Path) else packed.adapter.path
        model._put(f"{layer}/{name}", packed)
        if not own.routed:
            model._refresh()
        else:
            if isinstance(model.router, Router):
                model.router.add_missing(router_rows(model.stack))
            route_anew(model)
        if encoded and not own.shared:  # which have their row already
            _find_by(model, layer, name, encoded)


def remove(model: "MoLoRAModel", layer: str, name: str) -> None:
    _must_have(model, layer, name)
    own = model.stack[layer]
    with model.routing.lock:
        model._drop(f"{layer}/{name}")
        del own.adapters[name]
        if own.default == name:
            own.default = None
        if not own.routed:
            model._refresh()
            return
        if isinstance(model.router, Router):
            model.router.remove_row(f"{layer}/{name}")
        route_anew(model)


def replace(model: "MoLoRAModel", layer: str, name: str, path: str | Path) -> None:
    _must_have(model, layer, name)
    packed = _load(model, path)
    with model.routing.lock:
        model._drop(f"{layer}/{name}")
        model.stack[layer].adapters[name] = path
        model._put(f"{layer}/{name}", packed)
        model._refresh()


def merge(
    model: "MoLoRAModel",
    layer: str,
    names: Sequence[str],
    into: str,
    out: Path,
    examples: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> "MergeReport":
    from molora.compose.merge import merge as merged

    check_name(into, "an adapter")
    if into in model.stack[layer].adapters:
        raise StackError(f"Layer {layer!r} already has an adapter {into!r}: choose another name.")
    for name in names:
        _must_have(model, layer, name)
    report = merged({name: model.adapters[f"{layer}/{name}"].path for name in names}, out, **settings)
    try:
        add(model, layer, into, report.folder, examples)
    except BaseException:
        remove_folder(report.folder)  # or it would be in the way of another try
        raise
    return report


def fit(model: "MoLoRAModel", layer: str, name: str, examples: Sequence[str]) -> None:
    _must_have(model, layer, name)
    if model.stack[layer].shared:
        raise StackError(f"Layer {layer!r} is shared: its adapters have one row together.")
    encoded = encode_examples(model, examples, model.stack[layer].keyed)
    with model.routing.lock:
        _find_by(model, layer, name, encoded)


def route_anew(model: "MoLoRAModel") -> None:
    """Gives the stack as it is now its router: of a vocabulary's the rules whose adapters are still there."""
    router = model.router
    if isinstance(router, VocabularyRouter):
        rows = router_rows(model.stack)
        rules = {name: spans for name, spans in router.rules.items() if name in rows}
        router = VocabularyRouter(rules, rows, model.config.get_text_config().vocab_size)
    model.set_router(router)


@contextmanager
def _whole_or_not_at_all(model: "MoLoRAModel", layer: StackLayer, name: str) -> Iterator[None]:
    """Of an adapter that is added within, nothing stays after an error."""
    router, label = model.router, f"{layer.name}/{name}"
    try:
        with router.or_as_before() if isinstance(router, Router) else nullcontext():
            yield
    except BaseException:
        layer.adapters.pop(name, None)
        if label in model.adapters:
            model._drop(label)
        model.router = router  # unchecked: of a layer that is new too it has no rows yet
        model.routing.set_router(router)
        model._refresh()
        raise


def _must_have(model: "MoLoRAModel", layer: str, name: str) -> None:
    if name not in model.stack[layer].adapters:
        known = ", ".join(model.stack[layer].adapters) or "none at all"
        raise StackError(f"Layer {layer!r} has no adapter {name!r}; it has {known}.")


def _load(model: "MoLoRAModel", path: str | Path | Adapter | Packed) -> Packed:
    if isinstance(path, Packed):
        if path.made_for is model.adapted:
            return path
        path = path.adapter
    adapter = path if isinstance(path, Adapter) else load_adapter(path)
    check_fits(adapter, model.base, str(model.base_name), model.adapted.backend)
    return model.adapted.pack(adapter)


def _find_by(model: "MoLoRAModel", layer: str, name: str, encoded: Sequence[dict[str, torch.Tensor]]) -> None:
    if model.stack[layer].keyed:
        model.keys.put(layer, name, questions_of(model, encoded))
    else:
        fit_row(model, f"{layer}/{name}", encoded)
