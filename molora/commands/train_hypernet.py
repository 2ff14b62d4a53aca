"""``molora train hypernet``: networks that make adapters."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra
from molora.commands.training import ConfigOption, OverridesArgument, ResumeOption, command_line, join_processes, report

app = typer.Typer(
    help="Train a network that makes adapters: of documents, or of short texts about somebody.\n\n"
    "Example: molora train hypernet doc out=net loop.steps=10000",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
def doc(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train the network that makes adapters of documents; the base stays frozen.

    In: nothing (task: needle, a number hidden in made-up filler, or, of a share `facts`, other facts), or passages with
    questions (task: passages, from `molora train data passages`). Out: a folder for `molora internalize --hypernet`,
    with metrics.json; checkpoints and curves in runs/. An interrupted training goes on when the same line is given
    again. A second training goes on from the first one's folder (`start`), with longer texts or passages.

    Settings: out, task, tokens, grow, facts, data, name, questions, gaps, needles, apart, texts, validation, base,
    start, net.modules, net.rank, net.width, net.latents, net.blocks, net.heads, net.exit, net.chunk, loss.gold,
    loss.distil, loss.l1, loss.keep, loss.sparse, loss.apart, loop.steps, loop.learning_rate, loop.weight_decay,
    loop.warmup, loop.checkpoint_every, loop.seed, dtype.

    Example: molora train hypernet doc out=document-net loop.steps=10000

    Several processes: accelerate launch --num_processes 2 -m molora train hypernet doc out=document-net
    """
    with extra("train"):
        from molora_training.hypernet.document import DocumentHypernetSettings, train
        from molora_training.settings import load_settings

        settings = load_settings(DocumentHypernetSettings, config, overrides or ())
        join_processes()
        metrics = train(settings, resume=resume, command=command_line("train hypernet doc", config, overrides))
    report(metrics, settings.out, as_json)


@app.command()
def text(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train the network that makes adapters of short texts: of profiles, or of descriptions; the base stays frozen.

    In: a folder with three files for each group, which is a user or a task: GROUP.texts.json (a list of texts that
    stand for it), GROUP.train.jsonl and GROUP.validation.jsonl (conversations); `molora train manners` writes such a
    folder, and for people's profiles there is `molora train hypernet profile`. Out: a folder for `molora profile` and
    `molora describe`, with metrics.json and a model card. It is judged on groups that are held out, beside another
    group's text, a random one, and no adapter.

    Settings: out, data.folder, data.held_out, data.max_length, data.validate, data.source, data.licence, net.targets,
    net.rank, net.alpha, net.dropout, net.width, net.head, way, adapters, base, encoder, groups, conversations,
    loop.steps, loop.learning_rate, loop.weight_decay, loop.warmup, loop.checkpoint_every, loop.seed, dtype.

    Example: molora train hypernet text out=text-net data.folder=manners loop.steps=1500

    Several processes: accelerate launch --num_processes 2 -m molora train hypernet text --config text.yaml
    """
    with extra("train"), extra("personalize"):
        from molora_training.hypernet.text import train
        from molora_training.hypernet.text_settings import TextHypernetSettings
        from molora_training.settings import load_settings

        settings = load_settings(TextHypernetSettings, config, overrides or ())
        join_processes()
        metrics = train(settings, resume=resume, command=command_line("train hypernet text", config, overrides))
    report(metrics, settings.out, as_json)


@app.command()
def profile(
    name: Annotated[str, typer.Argument(metavar="SET", help="A set from `molora train people`.")],
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train the network that makes adapters of people's profiles.

    In: a prepared set of people. Of each, profiles of the first half of the history are written, and the second half is
    learnt; those held out are judged alone. Out: as of `molora train hypernet text`, whose settings these are, but for
    data.folder: the profiles go to runs/.

    Example: molora train hypernet profile raters out=profile-net loop.steps=400
    """
    with extra("train"), extra("personalize"):
        from molora_training.data.read_people import PACKAGES
        from molora_training.hypernet.profile_groups import prepared_groups
        from molora_training.hypernet.text import train
        from molora_training.hypernet.text_settings import TextHypernetSettings
        from molora_training.processes import Processes
        from molora_training.settings import load_settings

        package = PACKAGES.get(name)
        known = [f'data.source="{package.requirement}"', f'data.licence="{package.licence}"'] if package else []
        given = [*known, *(overrides or ()), f"data.folder={Path('runs/profiles') / name}"]  # which is where they go
        settings = load_settings(TextHypernetSettings, config, given)
        join_processes()
        with Processes().main_first():
            prepared_groups(name, data, settings.data.folder, settings.encoder)
        command = command_line(f"train hypernet profile {name}", config, overrides)
        metrics = train(settings, resume=resume, command=command)
    report(metrics, settings.out, as_json)
