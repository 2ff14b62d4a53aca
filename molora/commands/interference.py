"""``molora info --interference``: how much the adapters of a stack fight, and which to merge, stack or route."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molora.commands.common import extra, hide_loading_bars, write_json
from molora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from molora import Adapter
    from molora.factors import Factors


def interference(place: str, html: Path | None, data: Path | None, limit: int, as_json: bool) -> None:
    """Compares the adapters of ``place``, two at a time, by their weights, and with ``data`` by losses too.

    Args:
        place: a stack file, a saved MoLoRA (folder or Hub id), or a folder of PEFT folders.
        html: where a page with the maps goes, instead of the tables.
        data: a folder with NAME.test.jsonl or NAME.validation.jsonl of adapters.
        limit: conversations of each.

    Raises:
        ConfigError: there are fewer than two adapters. StackError, AdapterError: one of them is damaged.
        DataError: there is no data of any adapter, or the page cannot be written.
    """
    from molora.compose.interference import pairs
    from molora.factors import of_adapter
    from molora.loading import load_adapter

    base, folders = adapters_at(place)
    if len(folders) < 2:
        raise ConfigError(
            f"{place} holds {len(folders)} adapter{'s' * (not folders)}: interference is between two or more. Give a "
            f"stack file, a saved MoLoRA, or a folder of PEFT folders."
        )
    adapters = {label: load_adapter(folder) for label, folder in folders.items()}
    factors = {label: of_adapter(adapter) for label, adapter in adapters.items()}
    losses, left_out = (None, []) if data is None else _measured(base, adapters, factors, data, limit)
    found = pairs(factors, losses)
    if html is not None:
        from molora.compose.heat_map import heat_page

        try:
            html.write_text(heat_page(list(factors), found, losses, "MoLoRA interference"), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html} cannot be written: {error.strerror}.") from error
    if as_json:
        record = {"adapters": list(factors), "pairs": [asdict(pair) for pair in found], "losses": _plain(losses)}
        write_json({**record, "left_out": left_out})
    elif html is not None:
        counts = ", ".join(
            f"{sum(pair.advice == one for pair in found)} to {one}" for one in ("merge", "stack", "route")
        )
        typer.echo(f"{html}: {len(factors)} adapters, {len(found)} pairs; {counts}")
    else:
        from rich.console import Console

        from molora.compose.heat_map import show

        show(Console(highlight=False), list(factors), found, losses)
    if data is None:
        typer.echo("By weights alone this is a guess: with --data the losses decide.", err=True)
    if left_out:
        typer.echo(f"Judged by weights alone, for want of data: {', '.join(left_out)}.", err=True)


def adapters_at(place: str) -> tuple[str | None, dict[str, Path | str]]:
    """The base's name, where it is told, and the adapters of a stack file, a saved MoLoRA or a folder of PEFT folders:
    by "layer/name"; in a folder by their paths within it, of one part or two.

    Raises:
        StackError: it is a damaged one, or nothing is there.
    """
    from molora import Stack, saved
    from molora.adapter import CONFIG_FILE

    path = Path(place).expanduser()
    if path.is_dir() and not (path / saved.MANIFEST).is_file():
        files = sorted([*path.glob(f"*/{CONFIG_FILE}"), *path.glob(f"*/*/{CONFIG_FILE}")])
        return None, {file.parent.relative_to(path).as_posix(): file.parent for file in files}
    base, stack = (None, Stack.load(path)) if path.is_file() else saved.load(place)[:2]
    return base, {f"{layer.name}/{name}": folder for layer in stack.layers for name, folder in layer.adapters.items()}


def _measured(
    base: str | None, adapters: "Mapping[str, Adapter]", factors: "Mapping[str, Factors]", data: Path, limit: int
) -> "tuple[Tensor, list[str]]":
    """[N, N + 1], and the adapters without data."""
    with extra("train"):
        import torch
        from rich.console import Console
        from rich.progress import Progress

        from molora.base import DEFAULT_BASE, load_base
        from molora.checks import check_fits
        from molora_training.interference import losses, read_rows

        named = [adapter.config.get("base_model_name_or_path") for adapter in adapters.values()]
        name = base or next(filter(None, named), DEFAULT_BASE)
        on_gpu = torch.cuda.is_available()
        hide_loading_bars()
        loaded, tokenizer = load_base(name, torch.bfloat16 if on_gpu else torch.float32, "cuda" if on_gpu else None)
        for adapter in adapters.values():
            check_fits(adapter, loaded, name, "torch")
        rows = read_rows(data, list(factors), tokenizer, limit)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task("losses", total=None)
            found = losses(
                loaded, tokenizer, factors, rows, lambda done, of: bars.update(task, completed=done, total=of)
            )
        return found, [label for label in factors if label not in rows]


def _plain(losses: "Tensor | None") -> Any:
    """Lists of numbers, None for NaN."""
    if losses is None:
        return None
    return [[None if value != value else round(value, 6) for value in row] for row in losses.tolist()]
