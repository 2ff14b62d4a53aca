"""``molora train``: data, adapters and routers."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra
from molora.commands.train_hypernet import app as hypernet
from molora.commands.training import (
    ConfigOption,
    OutOption,
    OverridesArgument,
    ResumeOption,
    command_line,
    join_processes,
    report,
    report_data,
)

app = typer.Typer(
    help='Prepare data, train adapters, train a router. Needs the extra "train".\n\n'
    "The usual order: train data, train adapter (once for each), train router.\n\n"
    "Example: molora train data math code",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(hypernet, name="hypernet")


@app.command()
def adapter(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA adapter on a frozen base.

    In: JSON Lines of conversations (data.train, data.validation). Out: a PEFT folder at `out` with a model card and
    metrics.json; checkpoints and curves in runs/. An interrupted training goes on when the same line is given again.

    Settings, with their defaults:

    - out, data.train, data.validation: these must be given
    - data.max_length=1024 tokens, longer conversations are left out; data.source, data.licence: for the model card
    - base: the model, by default the starter's; dtype=bfloat16, of its weights
    - lora.rank=16, lora.alpha=32, lora.targets=all-linear, lora.rslora=false, lora.dropout=0: as in PEFT
    - lora.start_dropout=0: of every other question up to so many first tokens are left to the base
    - start: a PEFT adapter to go on from; or stack: a saved MoLoRA, which acts while the new adapter learns
    - learning_rate=2e-4, warmup=0.05 of the steps, epochs=3, max_steps, batch_tokens=4096 a step, seed=0
    - checkpoint_every=100 steps, with a validation each

    Example: molora train adapter --config math.yaml lora.rank=8 epochs=2

    Several processes: torchrun --nproc-per-node 2 -m molora train adapter --config math.yaml
    """
    with extra("train"):
        from molora_training.adapter import train
        from molora_training.adapter_settings import AdapterTrainSettings
        from molora_training.settings import load_settings

        settings = load_settings(AdapterTrainSettings, config, overrides or ())
        join_processes()
        metrics = train(settings, resume=resume, command=command_line("train adapter", config, overrides))
    report(metrics, settings.out, as_json)


@app.command()
def router(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train the router of a stack; its adapters and the base stay frozen.

    In: a stack.yaml or a saved MoLoRA (`model`), and a folder of prepared data (`data`, by default MoLoRA's) with a
    DOMAIN.train.jsonl and a DOMAIN.validation.jsonl for each adapter that the router shall choose. Out: a saved MoLoRA
    at `out`, with router.metrics.json; checkpoints and curves in runs/.

    Settings, with their defaults:

    - model, out: these must be given; data: by default MoLoRA's; base: of a stack.yaml; dtype=bfloat16, of its weights
    - start=new, or saved: go on from the router that the model has
    - router.reads=[0,4]: the embedding, and again what enters decoder layer 4; router.weights=unit, or softmax
    - router.width=128, router.hidden=512, router.units=128, router.depth=2: sizes; router.decays and
      router.learn_decays: moving averages as its memory in place of units
    - mixed=3000, documents=2000, in_a_turn=2000, asides=2000, both=0: how many texts of each kind are mixed
    - null_start: so many first tokens of a text are left to the base; by default none, or as the saved router has it
    - loss.label=1, loss.lm=0, loss.distil=0, loss.balance=0, loss.z=1e-4, loss.entropy=0: weights of the loss's parts
    - learning_rate=1e-3, warmup=0.05 of the steps, weight_decay=0.01, epochs=3, max_steps, batch_tokens=8192 a step,
      max_length=1024 tokens of a text, seed=0
    - checkpoint_every=200 steps, with a validation each

    Example: molora train router model=stack.yaml out=my-molora epochs=2

    Several processes: accelerate launch --num_processes 2 -m molora train router --config router.yaml (with GPUs; on
    CPUs use torchrun as for an adapter)
    """
    with extra("train"):
        from molora_training.router import train
        from molora_training.router_settings import RouterTrainSettings
        from molora_training.settings import load_settings

        settings = load_settings(RouterTrainSettings, config, overrides or ())
        join_processes()
        metrics = train(settings, resume=resume, command=command_line("train router", config, overrides))
    report(metrics, settings.out, as_json)


@app.command()
def pieces(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Sentence embeddings. Default: MiniLM.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a pool of pieces, from which `molora assemble` puts users' adapters together.

    In: a prepared set of people (`molora train people`). Out: a folder with the adapters of those who share, in pieces,
    a gate of each, and metrics.json. An interrupted training goes on when the same line is given again.

    Settings: out, people, data, base, sharers, rank, alpha, targets, learning_rate, epochs, gate_epochs,
    gate_learning_rate, batch_tokens, max_length, at_once (adapters that learn side by side), task (a PEFT folder that
    acts beneath), seed, dtype.

    Example: molora train pieces people=presidents out=pieces sharers=20
    """
    with extra("train"), extra("personalize"):
        from molora.personalize.embeddings import DEFAULT_ENCODER, SentenceEncoder
        from molora_training.pieces import PiecesSettings, train
        from molora_training.settings import load_settings

        settings = load_settings(PiecesSettings, config, overrides or ())
        made = SentenceEncoder(encoder or DEFAULT_ENCODER)
        metrics = train(settings, made.encode, command_line("train pieces", config, overrides), made.name)
    report(metrics, settings.out, as_json)


@app.command()
def soup(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a soup: one adapter out of several, each weighed anew in every module (LoRA Soups, CAT).

    In: PEFT folders (adapters.NAME) and JSON Lines of conversations of all that it is to do (train, validation). Out: a
    PEFT folder of the sum of the ranks, with metrics.json: the loss on the validation text of the base, of each
    adapter, of even weights, and of the soup.

    Settings: adapters, train, validation, out, base, steps, learning_rate, batch_tokens, max_length, seed, dtype.

    Example: molora train soup adapters.math=adapters/math adapters.law=adapters/law train=both.jsonl
    validation=held-out.jsonl out=soup
    """
    with extra("train"):
        from molora_training.settings import load_settings
        from molora_training.soup_run import SoupSettings, run

        settings = load_settings(SoupSettings, config, overrides or ())
        metrics = run(settings, command_line("train soup", config, overrides))
    report(metrics, settings.out, as_json)


@app.command()
def data(
    domains: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOMAIN", help="Default: five domains and the users.", show_default=False),
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch and prepare conversations for the domains (math, code, medicine, law, ukrainian) and the two users; where
    they are named also for science, reading, commonsense and puzzles, questions that need two adapters (both), 128
    small domains within all of these (many), and passages with questions for a hypernetwork (passages).

    In: nothing; the sources are fetched once. Out: NAME.train.jsonl, .validation.jsonl and .test.jsonl for each, and
    mixed conversations where all domains are asked for. What is there already is kept.

    Example: molora train data math code --out data
    """
    with extra("train"):
        from molora_training.data import data_dir, prepare

        counts = prepare(domains, out=out) if domains else prepare(out=out)
    found = {name: {"examples": row.examples, "overlapping": row.overlapping} for name, row in counts.items()}
    report_data(found, out or data_dir(), as_json)


@app.command()
def people(
    sets: Annotated[list[str] | None, typer.Argument(metavar="SET", help="Default: all.", show_default=False)] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch and prepare sets of people, each with a history of questions and answers: presidents (speeches), senders
    (e-mails), writers (Ukrainian texts), raters (films).

    In: nothing; the sources are fetched once. Out: people-SET.train.jsonl (the histories), .validation.jsonl and
    .test.jsonl; task-SET.train.jsonl and so on, which hold what all say but those held out, for an adapter of the task.
    A share of the people is held out of whatever is trained on several. Addresses of mail are hashed.

    Example: molora train people presidents --out data
    """
    with extra("train"), extra("personalize"):
        from molora_training.data import data_dir
        from molora_training.data.people import prepare_people

        counts = prepare_people(sets, out=out) if sets else prepare_people(out=out)
    found = {name: {"people": row.people, "examples": row.interactions} for name, row in counts.items()}
    report_data(found, out or data_dir(), as_json)


@app.command()
def personas(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="PERSONA", help="Default: all.", show_default=False)
    ] = None,
    out: OutOption = None,
    tries: Annotated[int, typer.Option(min=1, help="Answers sampled for each question; the best is kept.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write conversations in the voice of each persona: the base answers everyday questions in that manner.

    In: nothing. Out: PERSONA.train.jsonl, .validation.jsonl and .test.jsonl, for `molora train adapter`. Slow on a
    CPU: the base writes every answer several times.

    Example: molora train personas --tries 2 --out data
    """
    with extra("train"):
        from molora_training.data import data_dir
        from molora_training.personas import prepare

        counts = prepare(out=out, names=names or (), tries=tries, seed=seed)
    report_data({name: {"examples": row} for name, row in counts.items()}, out or data_dir(), as_json)


@app.command()
def manners(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the manners go.")] = Path("manners"),
    limit: Annotated[int, typer.Option(min=1, help="Conversations of a manner to learn from, at most.")] = 1000,
    base: Annotated[
        str | None, typer.Option(help="The model that answers. Default: the starter's.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write manners of speaking with descriptions, from which a network learns to make adapters of descriptions.

    The base answers everyday questions; each manner is a rule by which the answers are said differently. In: nothing,
    or the answers of a run before. Out: a folder for `molora train hypernet text`. A quarter of an hour on two cores.

    Example: molora train manners --out manners
    """
    with extra("train"), extra("personalize"):
        from molora.base import DEFAULT_BASE
        from molora_training.manners import write_manners

        counts = write_manners(out, limit, base or DEFAULT_BASE)
    report_data({name: {"examples": {"train": count}} for name, count in counts.items()}, out, as_json)


@app.command()
def starter(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
) -> None:
    """Train the whole starter stack: personas' data, adapters of every layer, the routers of the results table.

    In: prepared data (`molora train data`). Out: a saved MoLoRA at `out` (default: starter), the routers that were
    compared in `work`/routers. What is there already is kept, so an interrupted run goes on.

    Settings: out, work, data, sources, base, layers, integration, routers, own, processes and router_processes
    (trainings at once), batch_tokens, router_batch_tokens, router_epochs, router_mixed, router_documents,
    router_in_a_turn, router_asides, router_both, router_null_start, seed.

    Example: molora train starter processes=4

    On 2 CPU cores this takes a night; the small recipe takes an hour: molora train starter --config
    training/molora_training/configs/starter-small.yaml
    """
    with extra("train"):
        from molora_training.settings import load_settings
        from molora_training.starter import CONFIG, StarterSettings, train

        settings = load_settings(StarterSettings, config or CONFIG, overrides or ())
        train(settings)
    typer.echo(f"The stack lies in {settings.out}.")
