"""``molora compress``: many adapters of one base in the room of few."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora.commands.common import JsonOption, write_json

if TYPE_CHECKING:
    from molora.compose.manifest import StoreReport


def compress(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Each folder in it that is an adapter goes in.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The compressed store, of which there must be none.")],
    basis: Annotated[
        int, typer.Option(min=1, help="Directions that all adapters share in a module: more lose less.")
    ] = 64,
    clusters: Annotated[
        int, typer.Option(min=1, help="Groups of adapters that are alike, each with directions of its own.")
    ] = 1,
    most_error: Annotated[
        float, typer.Option(min=0, help="An adapter that would lose a larger share of its norm is kept as it is.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of the grouping.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compress many adapters of one base: directions that all share, and of each adapter a small core.

    In: a folder of PEFT folders, each named as its adapter. Out: a compressed store; of each adapter it says what was
    lost, and one that would lose too much is kept as it is.

    Example: molora compress adapters --basis 64 --out compressed
    """
    from molora.adapter import CONFIG_FILE
    from molora.compose.store import compress as compress_adapters
    from molora.errors import AdapterNotFoundError

    found = {place.parent.name: place.parent for place in sorted(folder.glob(f"[!.]*/{CONFIG_FILE}"))}
    if not found:
        raise AdapterNotFoundError(
            f"{folder} holds no adapters: give a folder of PEFT folders, each with {CONFIG_FILE}. Nothing was written."
        )
    with _bar() as on_step:
        report = compress_adapters(
            found, out, basis=basis, clusters=clusters, most_error=most_error, seed=seed, on_step=on_step
        )
    if as_json:
        write_json(
            {
                "store": report.folder,
                "adapters": len(report.errors),
                "raw": list(report.raw),
                "clusters": report.clusters,
                "bytes_before": report.bytes["raw_bytes"],
                "bytes_after": report.total_bytes,
                "share": report.share,
                "median_error": report.median_error,
                "worst_error": report.worst_error,
                "errors": report.errors,
            }
        )
    else:
        _print(report)


@contextmanager
def _bar() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar on stderr, of what is done just now."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield on_step


def _print(report: "StoreReport") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column(Text(str(report.folder)), overflow="fold")
    errors = (
        "none is compressed"
        if report.median_error is None
        else f"{report.median_error:.4f} median, {report.worst_error:.4f} worst"
    )
    rows = {
        "adapters": f"{len(report.errors):,}",
        "kept raw": f"{len(report.raw):,}",
        "bytes before": f"{report.bytes['raw_bytes']:,}",
        "bytes after": f"{report.total_bytes:,} ({report.share:.1%})",
        "error": errors,
    }
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
