"""``molora update``: a new version of an adapter from new conversations."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molora.commands.common import JsonOption, extra, write_json
from molora.errors import ConfigError, VersionError

if TYPE_CHECKING:
    from molora_training.continual.update import Change, Updated


def update(
    layer: Annotated[str, typer.Argument(metavar="LAYER|router", help="The adapter's layer, or 'router'.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE|FOLDER", help='New conversations, a {"messages": [...]} a line; of a router a data folder.'
        ),
    ],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="A saved MoLoRA.")],
    name: Annotated[str | None, typer.Argument(metavar="ADAPTER", help="Its name; not of the router.")] = None,
    general: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Conversations that have nothing to do with it, about a hundred: a fifth judges what the update does "
            "to such, others hold it to what the base says.",
        ),
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --general: how strongly its conversations are held to what the base says. Less learns more of "
            "what is new, more keeps the general ones better. Default: 30.",
            show_default=False,
        ),
    ] = None,
    max_forgetting: Annotated[
        float, typer.Option(min=0, help="How much the loss on old conversations may grow, as a share.")
    ] = 0.02,
    memory: Annotated[int, typer.Option(min=0, help="Bytes of conversations to remember; 0: keep no text.")] = 2**20,
    invent: Annotated[
        int, typer.Option(min=0, help="Conversations that the adapter makes up itself, to be replayed too.")
    ] = 0,
    method: Annotated[
        Literal["plain", "elastic", "orthogonal", "distil", "inflora", "sd-lora", "treelora"],
        typer.Option(help="What holds it back while it learns; plain: nothing but what is remembered."),
    ] = "plain",
    new: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANK", help="Begin an adapter of this rank, which the layer does not have yet."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over what is learnt. Default: 3, of a router 1.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of the learning rate. Default: 0.0002, of a router 0.001, or 0.003 where some adapters have no "
            "data.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Give an adapter a new version that has learnt from new conversations, if it loses little of what it knew.

    In: a saved MoLoRA and a file of conversations, about twenty or more. A fifth of them is held out, to judge by; the
    others are learnt, beside as many that were remembered at earlier updates. Out: a new version in the saved MoLoRA,
    and what was learnt and lost. It serves from the next load on if the loss on old conversations stays within bounds;
    otherwise it is kept to be looked at, what serves stays, and the command ends with 1.

    `molora update router` trains the router on for a short while, after adapters came or went: --data is a folder of
    `molora train data`, and the bound is how many of a domain's tokens may be found less. Adapters without data there
    are protected by the samples that the router keeps, and the rows of the others alone are trained.

    `--new 8` begins an adapter of that rank. Where each adapter has its own row of the router, the new one's is fitted
    to the conversations, and the version serves only if it does not take what the others are found by. In a keyed layer
    the same holds of its key.

    Example: molora update user ada --data new_chats.jsonl --model my-molora
    """
    changed = {"epochs": epochs, "learning_rate": learning_rate}
    chosen: dict[str, Any] = {key: value for key, value in changed.items() if value is not None}
    if layer == "router" and name is None:
        if general is not None or hold is not None or invent or method != "plain" or new is not None:
            raise ConfigError(
                "--general, --hold, --invent, --method and --new are for an adapter: a router has its data."
            )
        _router(model, data, max_forgetting, chosen, as_json)
        return
    if name is None:
        raise VersionError(f"Name an adapter of the layer {layer!r}, or 'router' alone.")
    with extra("train"):
        from molora_training.continual.update import UpdateSettings
        from molora_training.continual.update import update as run

        if hold is not None:
            chosen["hold"] = hold
        settings = UpdateSettings(
            model, layer, name, data, general=general, max_forgetting=max_forgetting,
            memory=memory, invent=invent, method=method, new=new, **chosen,
        )  # fmt: skip
        found = run(settings, command=f"molora update {layer} {name} --data {data.name}")
    if as_json:
        write_json(asdict(found))
    else:
        _show(found, max_forgetting)
    if not found.promoted:
        raise typer.Exit(1)


def _router(model: Path, data: Path, most: float, chosen: dict[str, Any], as_json: bool) -> None:
    with extra("train"):
        from molora_training.continual.router_update import RouterUpdateSettings, update_router

        settings = RouterUpdateSettings(model, data, max_forgetting=most, **chosen)
        found = update_router(settings, command=f"molora update router --data {data.name}")
    if as_json:
        write_json(asdict(found))
    else:
        typer.echo("held-out tokens that go to their own adapter:")
        for name, (before, after) in [*found.right.items(), ("mixed text", found.mixed)]:
            samples = "  (of the router's samples: no data)" if name in found.sampled else ""
            typer.echo(f"  {name:<16} {before:6.1%} -> {after:6.1%}{samples}")
        typer.echo(f"{found.drift:.1%} of the tokens go elsewhere than before.")
        state = "serves" if found.promoted else "is kept and does not serve"
        typer.echo(f"Version {found.version} {state}: {found.why}. {found.seconds:.0f} s")
    if not found.promoted:
        raise typer.Exit(1)


def _show(found: "Updated", most: float) -> None:
    typer.echo(_line("learnt", found.learnt, f", by chance alone in {found.learnt.chance:.1%} of cases"))
    for name, change, missing in (
        ("kept", found.kept, "nothing was remembered yet"),
        ("general", found.general, "not measured: --general names conversations that have nothing to do with it"),
    ):
        typer.echo(_line(name, change, f", at most {most:+.1%}") if change else f"{name:<8} {missing}")
    if found.found is not None:
        typer.echo(f"found    by {found.found:.1%} of the held-out new conversations' questions")
    state = "serves" if found.promoted else "is kept and does not serve"
    typer.echo(f"Version {found.version} {state}: {found.why}. {found.seconds:.0f} s")


def _line(name: str, change: "Change", bound: str) -> str:
    return (
        f"{name:<8} {change.before:.4f} -> {change.after:.4f} nats a token ({change.growth:+.1%}{bound}), "
        f"{change.conversations} held-out conversations"
    )
