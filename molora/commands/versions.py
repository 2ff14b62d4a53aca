"""``molora versions`` and ``molora rollback``: what an adapter or the router was before, and the way back to it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molora.commands.common import JsonOption, model_place, write_json
from molora.errors import VersionError

if TYPE_CHECKING:
    from molora.versions import Versions

LayerArgument = Annotated[str, typer.Argument(metavar="LAYER|router", help="The adapter's layer, or 'router'.")]
NameArgument = Annotated[str | None, typer.Argument(metavar="ADAPTER", help="Its name; not of the router.")]
SavedOption = Annotated[
    str | None, typer.Option("--model", metavar="FOLDER", help="A saved MoLoRA. Default: the starter stack.")
]


def versions(
    layer: LayerArgument, name: NameArgument = None, model: SavedOption = None, as_json: JsonOption = False
) -> None:
    """Show the versions of an adapter or of the router: which one serves, and what each came from.

    Example: molora versions user ada --model my-molora
    """
    mine = _versions(layer, name, model)
    current, every = mine.current, mine.all()
    if as_json:
        write_json({"current": current, "versions": [asdict(version) for version in every]})
        return
    if not every:
        typer.echo(f"{mine.label} has no versions: it is as it was saved.")
    for version in every:
        state = "serves" if version.number == current else "" if version.passed else "failed"
        came = f"from {version.parent}" if version.parent else ""
        typer.echo(f"{version.number:>4}  {version.created}  {state:<6}  {came:<8}  {version.why}".rstrip())


def rollback(
    layer: LayerArgument,
    name: NameArgument = None,
    to: Annotated[int | None, typer.Option(help="A number. Default: what serves was made from it.")] = None,
    model: SavedOption = None,
) -> None:
    """Let an earlier version serve again. What was made since stays.

    Example: molora rollback user ada --model my-molora
    """
    mine = _versions(layer, name, model)
    typer.echo(f"Version {mine.rollback(to)} of {mine.label} serves.")


def _versions(layer: str, name: str | None, model: str | None) -> "Versions":
    from molora.versions import Versions

    place = Path(model_place(model))
    if layer == "router" and name is None:
        return Versions(place)
    if name is None:
        raise VersionError(f"Name an adapter of the layer {layer!r}, or 'router' alone.")
    return Versions(place, layer, name)
