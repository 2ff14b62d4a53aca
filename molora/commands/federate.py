"""``molora federate``: an adapter that learns from many people's conversations, which stay where they are."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import JsonOption, extra, write_json
from molora.commands.training import OverridesArgument, ResumeOption, command_line
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora_training.federated.outcome import Into

app = typer.Typer(
    help="Train one adapter with many people, whose conversations stay where they are. "
    'Needs the extra "federated", in an environment of its own (`make federated`).\n\n'
    "Example: molora federate run --simulate 20 --config training/molora_training/configs/federate.yaml",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file of settings; an unknown key is an error."),
]
IntoOption = Annotated[
    tuple[Path, str, str] | None,
    typer.Option(
        metavar="MODEL LAYER NAME",
        help="An adapter of a saved MoLoRA, which goes on learning or is begun: what comes out is a new version of it, "
        "and serves only if it passes its gate. Default: a PEFT folder.",
        show_default=False,
    ),
]
GeneralOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="With --into: conversations that have nothing to do with it, for its gate."),
]


@app.callback()
def _group() -> None:
    """Train one adapter with many people, whose conversations stay where they are."""


@app.command()
def run(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    simulate: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="How many clients take part. Default: all.", show_default=False),
    ] = None,
    into: IntoOption = None,
    general: GeneralOption = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: beside the adapter.")] = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Simulate a federation on this machine: clients, server and what goes between them, as they are over many hosts.

    In: a folder with a file of conversations for each client (`<client>.jsonl`, or `<client>.train.jsonl` of `molora
    train data`), and settings. A fifth of each client's conversations is held out, to tell what was learnt. Out: an
    adapter, and a JSON report with every round: who answered, was refused or stayed away, and what it cost each client
    in bytes, seconds and memory. A run that was interrupted goes on after its last round.

    Settings: data, clients, out, base, start, ranks, rounds, aggregate (flexlora, changes, stack, factors, shared),
    local (method, examples, epochs, learning_rate, batch_tokens, max_length, judged), limits (seconds, fewest,
    max_norm, max_forgetting), privacy (epsilon, delta, clip, cohorts, secure), router (a saved MoLoRA
    whose router gets a row for the adapter), seed.

    Example: molora federate run data=chats rounds=5 ranks=[4,16] local.examples=32
    """
    began = time.monotonic()
    with extra("train"), extra("federated"):
        from molora_training.federated import outcome
        from molora_training.federated.place import only_server
        from molora_training.federated.progress import Progress
        from molora_training.federated.rounds import Federation
        from molora_training.federated.simulate import client_files
        from molora_training.federated.simulate import simulate as run_all
        from molora_training.report import write_report

        settings = _settings(config, overrides, target := _into(into, general), resume)
        files = client_files(settings, simulate)
        command = command_line("federate run", config, overrides) + (f" --simulate {simulate}" if simulate else "")
        with only_server(settings.out):
            federation = Federation.open(settings, resume)
            with Progress(settings.rounds, federation.round, len(files)) as progress:
                losses = run_all(settings, files, federation, progress)
            found = outcome.report(federation, losses, command, time.monotonic() - began)
            promoted = True
            if target is not None:
                kept = outcome.keep(federation, losses, target, command, {"privacy": found["privacy"]})
                found["version"], promoted = vars(kept), kept.promoted
            else:
                outcome.write(federation, settings.out)
            file = report or settings.out.with_name(f"{settings.out.name}.report.json")
            write_report(outcome.plain(found), file)
    if as_json:
        write_json(outcome.plain(found))
    else:
        _show(found, settings.out if target is None else None, file)
    if not promoted:
        raise typer.Exit(1)


@app.command(name="app")
def flower_app(
    folder: Annotated[Path, typer.Argument(help="Where the app goes; there must be none.")],
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    into: IntoOption = None,
    general: GeneralOption = None,
) -> None:
    """Write the Flower app that trains over several hosts: for `flwr run FOLDER SUPERLINK --stream`.

    In: the settings of `molora federate run`, but for `data` and `clients`: each host names its own data. Out: a folder
    with a `pyproject.toml` that holds the settings, and the names of MoLoRA's server and client. Whoever runs the
    SuperLink needs the base and, with --into, the saved MoLoRA; `out` and --into are places on that host. Each client
    is a SuperNode:

    `flower-supernode --superlink HOST:PORT --root-certificates ca.crt --node-config 'data="chats.jsonl" rank=8'`

    Example: molora federate app speeches --config training/molora_training/configs/federate.yaml
    """
    with extra("train"), extra("federated"):
        from molora_training.federated.flower_app import write_app

        target = _into(into, general)
        write_app(folder, _settings(config, overrides, target, False), target)
    typer.echo(f"flwr run {folder} SUPERLINK --stream    # SUPERLINK: of ~/.flwr/config.toml, see docs/federated.md")


def _into(into: tuple[Path, str, str] | None, general: Path | None) -> "Into | None":
    from molora_training.federated.outcome import Into

    if into is None:
        if general is not None:
            raise ConfigError("--general is for the gate of a version: name what it is a version of by --into.")
        return None
    return Into(into[0].resolve(), into[1], into[2], general.resolve() if general is not None else None)


def _settings(config: Path | None, overrides: list[str] | None, into: "Into | None", resume: bool) -> Any:
    """With the adapter that serves to begin with, where there is one."""
    from dataclasses import replace

    from molora_training.data import data_dir
    from molora_training.federated.settings import FederateSettings
    from molora_training.settings import load_settings

    settings = load_settings(FederateSettings, config, overrides or ())
    if settings.data == FederateSettings.data and not settings.data.is_dir():
        settings = replace(settings, data=data_dir())
    if into is not None:
        settings = into.begin(settings, resume)
    return settings


def _show(found: Mapping[str, Any], out: Path | None, file: Path) -> None:
    """What came out, in a few lines."""
    learnt = found["learnt"]
    if learnt is not None:
        change = learnt["after"] / learnt["before"] - 1
        typer.echo(
            f"learnt    {learnt['before']:.4f} -> {learnt['after']:.4f} nats a token ({change:+.1%}), "
            f"{learnt['conversations']} conversations that clients held out"
        )
    if found["privacy"] is not None:
        own = found["privacy"]
        typer.echo(f"privacy   epsilon {own['epsilon']:.2f} at delta {own['delta']:g}, for {own['unit']}")
    refused = sum(len(one["refused"]) for one in found["rounds"])
    absent = sum(len(one["absent"]) for one in found["rounds"])
    typer.echo(f"{len(found['rounds'])} rounds, {refused} updates refused, {absent} absent. {found['seconds']} s")
    if "version" in found:
        kept = found["version"]
        typer.echo(f"Version {kept['version']} {'serves' if kept['promoted'] else 'does not serve'}: {kept['why']}")
    else:
        typer.echo(f"{out} holds the adapter.")
    typer.echo(f"{os.fspath(file)} tells the rest.")
