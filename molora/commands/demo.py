"""``molora demo``: the model in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import ModelArgument, extra, model_place
from molora.errors import ConfigError

NETWORKS = ("document", "description", "profile", "pieces")


def demo(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=FOLDER",
            help=f"What makes adapters at once, several times: {', '.join(NETWORKS)}. Each opens a way to teach, or is "
            "used in place of the shipped one.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Show a running `molora serve`, not a model of this process.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="MOLORA_API_KEY", help="A key of that server.", show_default=False)
    ] = None,
) -> None:
    """Serve the browser demo: a chat whose tokens are coloured by the adapter that spoke, and which can be taught.

    Needs the extra "demo". Stop it with Ctrl+C. Over a server there are no routes of a text and nothing is taught.

    Example: molora demo --port 8080 --no-browser --network pieces=pieces

    Example: molora demo --server http://127.0.0.1:8000
    """
    networks = read_networks(network or [])
    if server is not None and (model is not None or networks):
        raise ConfigError("--server stands alone: a model or --network is for a model of this process.")
    place = model_place(model) if server is None else None
    with extra("demo"):
        from molora_demo.app import launch, local
        from molora_demo.remote import ServerSource

        source = local(place) if place is not None else ServerSource(str(server), key)
        launch(source, host=host, port=port, open_browser=browser, networks=networks)


def read_networks(given: list[str]) -> dict[str, Path]:
    """``document=FOLDER`` and the like, by kind.

    Raises:
        ConfigError: a kind that there is not, or a folder that is not there.
    """
    found = {}
    for one in given:
        kind, _, folder = one.partition("=")
        if kind not in NETWORKS or not folder:
            raise ConfigError(f"--network takes KIND=FOLDER with one of {', '.join(NETWORKS)}, not {one!r}.")
        found[kind] = Path(folder).expanduser()
        if not found[kind].is_dir():
            raise ConfigError(f"--network {kind}: there is no folder {folder}.")
    return found
