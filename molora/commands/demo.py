"""``molora demo``: the chat in a browser."""

from typing import Annotated

import typer

from molora.commands.common import ModelArgument, extra, model_place


def demo(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve the browser demo: a chat whose tokens are coloured by the adapter that spoke.

    Needs the extra "demo". Stop it with Ctrl+C.

    Example: molora demo --port 8080 --no-browser
    """
    place = model_place(model)
    with extra("demo"):
        from molora_demo.app import launch

        launch(place, host=host, port=port, open_browser=browser)
