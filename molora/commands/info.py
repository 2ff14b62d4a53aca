"""``molora info``: what is in a saved MoLoRA, a stack file or an adapter. The base model is not loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import JsonOption, model_place, write_json
from molora.errors import AdapterError, ConfigError, StackError

if TYPE_CHECKING:
    from molora import Adapter, Router, Stack, VocabularyRouter


def info(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|ADAPTER|STACK.yaml",
            help="A saved MoLoRA or a PEFT adapter (folder or Hub id), or a stack file. Default: the starter stack.",
        ),
    ] = None,
    interference: Annotated[
        bool, typer.Option("--interference", help="How much its adapters fight: which to merge, stack or route.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For --interference: NAME.test.jsonl of adapters. Then losses decide, which take a while; by weights "
            "alone the advice is a guess.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations of each adapter in --data.")] = 16,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write --interference as a page of maps.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the layers, adapters (rank, targets, size) and router of a model, without loading its base.

    Every file is checked on the way: a damaged adapter is named. With --interference each two of its adapters are
    compared instead.

    Example: molora info adapters/domain/math
    """
    if interference:
        from molora.commands.interference import interference as compare

        compare(model_place(what), html, data, limit, as_json)
        return
    if data is not None or html is not None:
        raise ConfigError("--data and --html belong to --interference.")
    record = describe(model_place(what))
    if as_json:
        write_json(record)
    else:
        _print(record)


def describe(place: str) -> dict[str, Any]:
    """A saved MoLoRA, a stack file or an adapter as plain values.

    Raises:
        StackError, RouterError, AdapterError: it is none of them, or a part of it is damaged.
    """
    from molora import Adapter, Stack, saved
    from molora.loading import load_adapter

    path = Path(place).expanduser()
    if path.suffix == ".safetensors":
        return {"kind": "adapter", **_adapter(load_adapter(path))}
    if path.is_file():
        return {"kind": "stack", "base": None, **_stack(Stack.load(path)), "router": None}
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return {"kind": "adapter", **_adapter(Adapter.load(path))}
    try:
        parts = saved.load(place)
    except StackError as error:
        if path.is_dir() or "/" not in place:
            raise
        try:  # an id on the Hub does not tell what it is
            return {"kind": "adapter", **_adapter(Adapter.load(place))}
        except AdapterError:
            raise error from None
    return {"kind": "molora", "base": parts.base, **_stack(parts.stack), "router": _router(parts.router)}


def _stack(stack: "Stack") -> dict[str, Any]:
    from molora.loading import load_adapter

    layers = [
        {
            "name": layer.name,
            "top_k": layer.top_k,
            "default": layer.default,
            "shared": layer.shared,
            "keyed": layer.keyed,
            "adapters": [{"name": name, **_adapter(load_adapter(path))} for name, path in layer.adapters.items()],
        }
        for layer in stack.layers
    ]
    return {"layers": layers}


def _adapter(adapter: "Adapter") -> dict[str, Any]:
    from molora.adapter import total_bytes

    return {
        "base": adapter.config.get("base_model_name_or_path"),
        "ranks": adapter.ranks,
        "targets": sorted({name.rsplit(".", 1)[-1] for name in adapter.modules}),
        "modules": len(adapter.modules),
        "parameters": adapter.parameters,
        "bytes": total_bytes([adapter]),
    }


def _router(router: "Router | VocabularyRouter | None") -> dict[str, Any] | None:
    from dataclasses import asdict

    from molora import VocabularyRouter

    if router is None:
        return None
    if isinstance(router, VocabularyRouter):
        return {"kind": "vocabulary", "rows": router.rows, "rules": router.rules}
    parameters = sum(parameter.numel() for parameter in router.parameters())
    return {"kind": "mlp", "rows": router.rows, "parameters": parameters, "settings": asdict(router.config)}


def _print(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if record["kind"] == "adapter":
        layers: list[dict[str, Any]] = [{"name": "", "adapters": [{"name": "", **record}]}]
    else:
        layers = record["layers"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "adapter", "rank", "targets"):
        table.add_column(heading, overflow="fold")
    for heading in ("modules", "parameters", "size"):
        table.add_column(heading, justify="right")
    for layer in layers:
        for adapter in layer["adapters"]:
            ranks = ", ".join(map(str, adapter["ranks"]))
            sizes = (str(adapter["modules"]), f"{adapter['parameters']:,}", f"{adapter['bytes'] / 1e6:.2f} MB")
            table.add_row(layer["name"], adapter["name"], ranks, ", ".join(adapter["targets"]), *sizes)
    console.print(Text(f"base: {record['base'] or 'not named'}"))
    for layer in record.get("layers", ()):
        told = ", one router row for all" if layer["shared"] else ", by keys" if layer["keyed"] else ""
        console.print(Text(f"layer {layer['name']}: top {layer['top_k']}, default {layer['default'] or 'none'}{told}"))
    console.print(table)
    if record["kind"] != "adapter":
        console.print(Text(f"router: {_router_line(record['router'])}"), soft_wrap=True)


def _router_line(router: Mapping[str, Any] | None) -> str:
    if router is None:
        return "none (adapters act when they are named, and by keys in a keyed layer)"
    rows = ", ".join(router["rows"])
    if router["kind"] == "vocabulary":
        return f"by vocabulary; rows {rows}"
    settings = ", ".join(f"{key} {value}" for key, value in router["settings"].items())
    return f"{router['parameters']:,} parameters; {settings}; rows {rows}"
