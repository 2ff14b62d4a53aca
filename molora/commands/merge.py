"""``molora merge``: adapters made into one."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from molora.commands.common import JsonOption, write_json

if TYPE_CHECKING:
    from molora.compose.merge import MergeReport

LOST = 0.5
AT_ONCE = 4  # modules in memory, on a machine of many cores


def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="PEFT folders or Hub ids, two or more.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write; it must not be there yet.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NUMBERS",
            help="One for each adapter, in their order: --weights .5,.3,.2, or -w .5 -w .3 -w .2. Negative ones "
            "subtract. Default: equal ones that sum to 1.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Literal[
            "cat",
            "svd",
            "linear",
            "ties",
            "ties_svd",
            "dare_linear",
            "dare_linear_svd",
            "dare_ties",
            "dare_ties_svd",
            "magnitude_prune",
            "magnitude_prune_svd",
            "knots",
        ],
        typer.Option(
            help="cat: exact, the ranks add up. svd: the nearest of a rank. linear, ties, dare, magnitude_prune: of A "
            "and B apart, as PEFT; with _svd: of their products. knots: TIES in the basis that the adapters share."
        ),
    ] = "cat",
    density: Annotated[
        float, typer.Option(help="Share of the numbers that ties, dare, magnitude_prune and knots keep.")
    ] = 0.5,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the result, for svd, _svd and knots. Default: the adapters' largest; knots: all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare's random choice.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters of one base into one, without loading the base.

    In: PEFT adapters. Out: a PEFT adapter, and how far it is from the weighted sum of what the adapters do: 0 is all of
    it, 1 as far as doing nothing.

    Example: molora merge math code sage --weights .5,.3,.2 --method svd --rank 16 --out merged
    """
    import torch

    from molora.compose.merge import merge as merge_adapters

    folders, shares = _parse(adapters, weights)
    with _bar() as advance:
        report = merge_adapters(
            {folder: folder for folder in folders},
            out,
            method,
            weights=shares,
            density=density,
            rank=rank,
            seed=seed,
            at_once=min(AT_ONCE, torch.get_num_threads()),
            on_module=advance,
        )
    layers = _by_layer(report.errors)
    if as_json:
        write_json(
            {
                "folder": report.folder,
                "method": report.method,
                "error": _finite(report.error),
                "layers": {name: _finite(error) for name, error in layers.items()},
                "errors": {name: _finite(error) for name, error in report.errors.items()},
                "ranks": report.ranks,
                "filled": report.filled,
                "left_out": report.left_out,
                "seconds": round(report.seconds, 3),
                "bytes": report.bytes,
            }
        )
    else:
        _print(report, layers)


def _parse(adapters: list[str], weights: list[str] | None) -> tuple[list[str], list[float] | None]:
    """Folders and weights; of ``--weights .5 .3 .2`` all but the first number arrive among the folders.

    Raises:
        typer.BadParameter: a weight is no number, or an adapter is given twice.
    """
    if weights is None:
        shares = None
    else:
        late = [one for one in adapters if _is_number(one) and not Path(one).exists()]
        adapters = [one for one in adapters if one not in late]
        shown = [one for one in re.split(r"[,\s]+", " ".join([*weights, *late])) if one]
        for one in shown:
            if not _is_number(one):
                raise typer.BadParameter(f"{one!r} is no weight: give numbers, as in --weights .5,.3,.2.")
        shares = [float(one) for one in shown]
    twice = sorted({one for one in adapters if adapters.count(one) > 1})
    if twice:
        raise typer.BadParameter(f"{', '.join(twice)} is given twice: give it once, with the sum of its weights.")
    return adapters, shares


def _finite(error: float) -> float | None:
    """None where the exact sum is zero, and what was written is not."""
    return error if math.isfinite(error) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("merging", total=None)
        yield lambda done, of: bars.update(bar, completed=done, total=of)


def _by_layer(errors: Mapping[str, float]) -> dict[str, float]:
    """The mean over a decoder layer's modules, by the layer's number; "other" for those outside of one."""
    grouped: dict[str, list[float]] = {}
    for module, error in errors.items():
        found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", module)
        grouped.setdefault(found[1] if found else "other", []).append(error)
    names = sorted(grouped, key=lambda name: (not name.isdigit(), name.zfill(6)))
    return {name: fmean(grouped[name]) for name in names}


def _print(report: "MergeReport", layers: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if report.method == "cat":
        console.print(f"cat is exact: the error is that of rounding, {report.error:.1e}.")
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer")
        table.add_column("error", justify="right")
        for name, error in layers.items():
            table.add_row(name, f"{error:.3f}")
        table.add_row("all", f"{report.error:.3f}", style="bold")
        console.print(table)
    if report.error > LOST:
        text = "Most of what these adapters do is lost: route between them or use cat."
        console.print(Text(text, style="yellow"), soft_wrap=True)
    for name, modules in report.filled.items():
        console.print(Text(f"{name} has nothing in {len(modules)} modules and counted as zero there."), soft_wrap=True)
    for name in report.left_out:
        console.print(Text(f"{name} brings weights of the base too: they are not in the result."), soft_wrap=True)
    ranks = ", ".join(map(str, sorted(set(report.ranks.values()))))
    line = f"{report.folder}: {len(report.ranks)} modules, rank {ranks}, {report.bytes / 1e6:.2f} MB"
    console.print(Text(f"{line}, in {report.seconds:.1f} s"), soft_wrap=True)
