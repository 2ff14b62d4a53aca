"""``molora forget``: a version that never saw some conversations, or an adapter that is gone as a whole."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra, write_json
from molora.errors import ConfigError


def forget(
    layer: Annotated[str, typer.Argument(help="The adapter's layer.")],
    name: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name.")],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="A saved MoLoRA.")],
    topic: Annotated[
        str | None, typer.Option(metavar="WORDS", help="Remembered conversations with these words, in any case.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The conversations of this file, remembered or not.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The adapter with all that belongs to it.")] = False,
    memory: Annotated[int, typer.Option(min=1, help="Bytes of conversations to remember.")] = 2**20,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over what is still remembered.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 2e-4,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter forget what updates taught it: some conversations, or all by taking it away.

    The adapter is trained anew from what it was before its first update, on what is still remembered without those
    conversations. It serves from the next load on; every version in between is deleted, and a table shows how likely
    the forgotten text is to each. `--all` deletes the adapter, its versions, what is remembered of it, and its row of
    the router.

    Example: molora forget user ada --topic "my knee" --model my-molora
    """
    if sum([topic is not None, data is not None, everything]) != 1:
        raise ConfigError("Say what is to be forgotten: --topic, --data or --all, one of them.")
    if everything:
        from molora.versions import Versions  # needs torch

        Versions(model, layer, name).erase()
        if as_json:
            write_json({"erased": f"{layer}/{name}"})
        else:
            typer.echo(f"{layer}/{name} is gone, with its versions, what was remembered, and its row of the router.")
        return
    with extra("train"):
        from molora_training.continual.forget import forget as run
        from molora_training.continual.update import UpdateSettings

        settings = UpdateSettings(
            model, layer, name, data or Path(), memory=memory, epochs=epochs, learning_rate=learning_rate
        )
        # What is to be forgotten is not written into the version that is to know nothing of it.
        found = run(settings, topic, command=f"molora forget {layer} {name}")
    if as_json:
        write_json(asdict(found))
        return
    typer.echo(f"{found.before.conversations} conversations were to be forgotten; nats a token:")
    typer.echo(f"  a version that never saw them  {found.before.before:.4f}")
    typer.echo(f"  served before                  {found.before.after:.4f}")
    left = "" if found.left is None else f"   {found.left:.0%} of the gain is left, by what is like them"
    typer.echo(f"  serves now                     {found.after.after:.4f}{left}")
    gone = ", ".join(map(str, found.removed)) or "none"
    typer.echo(f"{found.still} conversations are still remembered. Deleted versions: {gone}.")
    typer.echo(f"Version {found.version} serves. {found.seconds:.0f} s")
