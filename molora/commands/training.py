"""What the commands of ``molora train`` have in common: their options, and how they tell what came out."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from molora.commands.common import write_json

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings; an unknown key is an error.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file; part.key=value inside."),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        " /--no-resume", help="Start anew, also where an interrupted training could go on.", show_default=False
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Default: data in MoLoRA's cache.")]


def join_processes() -> None:
    """Without an accelerator, ``accelerate`` takes each process that torchrun starts for the only one, unless told."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def command_line(kind: str, config: Path | None, overrides: Sequence[str] | None) -> str:
    """The line that a model card or a report names."""
    file = ["--config", str(config)] if config is not None else []
    return shlex.join(["molora", *kind.split(), *file, *(overrides or ())])


def report(metrics: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """The metrics, told by one process; the others have nothing to do any more."""
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        _tell(metrics, out, as_json)
    state.destroy_process_group()


def _tell(metrics: Mapping[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        write_json({"out": out, **metrics})
        return
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if key == "validation":
            flat |= {f"validation {name}": number for name, number in value.items()}
        elif isinstance(value, str | int | float):
            flat[key.replace("_", " ")] = value
    print_table(("", str(out)), [(key, _number(value)) for key, value in flat.items()])


def report_data(found: Mapping[str, Mapping[str, Any]], folder: Path, as_json: bool) -> None:
    if as_json:
        write_json({"folder": folder, "domains": found})
        return
    rows = [(name, ", ".join(f"{split} {n}" for split, n in row["examples"].items())) for name, row in found.items()]
    print_table(("", f"examples in {folder}"), rows)


def print_table(headings: tuple[str, str], rows: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
