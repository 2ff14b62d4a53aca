"""``molora eval``: how well a stack and its router do."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra, write_json

app = typer.Typer(
    help='Measure a stack and its router. Needs the extra "train".\n\nExample: molora eval main',
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _group() -> None:
    """Measure a stack and its router."""


@app.command()
def main(
    model: Annotated[Path | None, typer.Argument(help="A saved MoLoRA. Default: the starter stack.")] = None,
    routers: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Saved MoLoRAs whose routers are compared too.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("docs/results/main.json"),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens in one forward.")] = 8192,
    limit: Annotated[int, typer.Option(min=0, help="Sequences of each set; 0: all.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The main table: loss of every contender on held-out single-domain and mixed text.

    In: a saved MoLoRA, and the data of `molora train data`. Out: a JSON file with a row for the base, each adapter
    alone, the uniform merge, the oracles, and the router(s), and whether each bar is reached.

    Example: molora eval main --limit 20
    """
    with extra("train"):
        from molora.starter import starter_folder
        from molora_training.data import data_dir
        from molora_training.main_table import run

        folder = model or starter_folder()
        command = "molora eval main" + (" --routers runs/starter/routers" if routers else "")
        command += f" --limit {limit}" if limit else ""
        report = run(folder, routers, data or data_dir(), out, command, batch_tokens, limit)
    if as_json:
        write_json(report)
        return
    for line in report["must"]:
        typer.echo(
            f"{'reached' if line['holds'] else 'missed '}  {line['name']}: {line['value']:.3f} (bar {line['bar']})"
        )
