"""``molora bench``: measurements of one machine."""

from typing import Any

import typer

from molora.commands.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    extra,
    hide_loading_bars,
    model_place,
    write_json,
)

app = typer.Typer(
    help="Measure speed on this machine.\n\nExample: molora bench decode --json",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def options() -> None:
    """Keeps `decode` a subcommand while it is the only one."""


@app.command()
def decode(model: ModelArgument = None, as_json: JsonOption = False, dtype: DtypeOption = Dtype.bfloat16) -> None:
    """Compare the pace of greedy decoding at batch 1: the bare base, MoLoRA, and PEFT's X-LoRA.

    MoLoRA has all its layers on: those that the router decides on auto, the first adapter of each other one. X-LoRA
    gets the same number of adapters and fewer tokens, for it computes the whole sequence twice for each. All three are
    measured in turns, and the median counts. Needs the extra "train" (PEFT).

    Example: molora bench decode --json > decode.json
    """
    with extra("train"):
        from molora.bench import measure_decode

        hide_loading_bars()
        record = measure_decode(model_place(model), dtype.value)
    if as_json:
        write_json(record)
    else:
        _print(record)


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in ("tokens/s", "of the base", "tokens", "runs"):
        table.add_column(heading, justify="right")
    pace = record["tokens_per_second"]
    for name, value in pace.items():
        runs = len(record["runs"][name])
        table.add_row(name, f"{value:.2f}", f"{value / pace['base']:.0%}", str(record["tokens"][name]), str(runs))
    console = Console(highlight=False)
    console.print(table)
    machine = f"{record['machine']}, {record['threads']} threads, torch {record['torch']}, {record['dtype']}"
    console.print(f"\nMoLoRA is {record['ratios']['molora_to_xlora']:.1f} times as fast as X-LoRA. {machine}")
