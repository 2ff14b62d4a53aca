"""``molora demo``: the model in a browser."""

from typing import Annotated

import typer

from molora.commands.common import ModelArgument, extra, model_place
from molora.errors import ConfigError


def demo(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Show a running `molora serve`, not a model of this process."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="MOLORA_API_KEY", help="A key of that server.", show_default=False)
    ] = None,
) -> None:
    """Serve the browser demo: a chat whose tokens are coloured by the adapter that spoke.

    Needs the extra "demo". Stop it with Ctrl+C.

    Example: molora demo --port 8080 --no-browser
    Example: molora demo --server http://127.0.0.1:8000
    """
    if server is not None and model is not None:
        raise ConfigError("Give a model or --server, not both: the server has its own.")
    place = model_place(model) if server is None else None
    with extra("demo"):
        from molora_demo.app import launch, local
        from molora_demo.remote import ServerSource

        source = local(place) if place is not None else ServerSource(str(server), key)
        launch(source, host=host, port=port, open_browser=browser)
