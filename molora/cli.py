"""The command ``molora``. A mistake of its user ends it with one sentence and exit code 2."""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from molora._version import __version__
from molora.commands.assemble import assemble
from molora.commands.bench_simulate import app as bench
from molora.commands.chat import chat
from molora.commands.compress import compress
from molora.commands.demo import demo
from molora.commands.eval_adapters import app as evaluate
from molora.commands.export import export
from molora.commands.federate import app as federate
from molora.commands.forget import forget
from molora.commands.generate import generate
from molora.commands.info import info
from molora.commands.internalize import internalize
from molora.commands.learn import learn
from molora.commands.merge import merge
from molora.commands.profile import describe, profile
from molora.commands.routes import routes
from molora.commands.serve import serve
from molora.commands.store import app as store
from molora.commands.train import app as train
from molora.commands.update import update
from molora.commands.versions import rollback, versions
from molora.errors import MoLoRAError

app = typer.Typer(
    name="molora",
    help="One frozen model, many small adapters, and a router that decides for every token which of them act.\n\n"
    "Every command tells what it takes, does and leaves, with an example: `molora COMMAND --help`.\n\n"
    "Example: molora chat",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)
# As `molora --help` shows them. Some are groups of commands.
COMMANDS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Ask a model": {"chat": chat, "demo": demo, "generate": generate, "routes": routes, "info": info},
    "Make adapters and routers": {
        "train": train, "internalize": internalize, "assemble": assemble, "profile": profile, "describe": describe,
        "merge": merge, "compress": compress, "federate": federate,
    },
    "Let an adapter learn, and forget": {
        "update": update, "learn": learn, "forget": forget, "versions": versions, "rollback": rollback,
    },
    "Serve": {"serve": serve, "store": store, "export": export},
    "Measure": {"eval": evaluate, "bench": bench},
}  # fmt: skip
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds the options of `molora` itself."""


def main() -> None:
    """Runs the command line."""
    # Before torch is imported: a waiting OpenMP thread would spin and take a core from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except MoLoRAError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(2)
