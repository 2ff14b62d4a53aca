"""``molora eval documents``, ``people``, ``conversations`` and ``merges``: what adapters are worth that were made of
text, or of other adapters."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra, write_json
from molora.commands.eval_studies import app, parse_share, show
from molora.commands.training import ConfigOption, OverridesArgument, command_line

EncoderOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FOLDER", help="Sentence embeddings of the search. Default: MiniLM.", show_default=False),
]


@app.command()
def documents(
    hypernet: Annotated[Path, typer.Argument(help="A network from `molora train hypernet doc`.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/documents.json"),
    limit: Annotated[int, typer.Option(min=1, help="Passages of the test split, with questions of each kind.")] = 200,
    needles: Annotated[int, typer.Option(min=1, help="Texts of each length with a number hidden in them.")] = 64,
    encoder: EncoderOption = None,
    as_json: JsonOption = False,
) -> None:
    """What does an adapter that was made of a document know of it?

    In: a network and prepared data (`molora train data passages science`). Out: a JSON file with the needles that are
    found by length, and answers to questions about passages, those of yes or no apart: with the passage's adapter,
    another's, one of its words shuffled, the passage in the prompt, and what a search puts there; what unrelated text
    loses; seconds and bytes.

    Example: molora eval documents document-net
    """
    with extra("train"), extra("personalize"):
        from molora.personalize.embeddings import DEFAULT_ENCODER, SentenceEncoder
        from molora_training.data import data_dir
        from molora_training.document_table import run

        command = f"molora eval documents {hypernet} --limit {limit} --needles {needles}"
        search = SentenceEncoder(encoder or DEFAULT_ENCODER)
        report = run(hypernet, data or data_dir(), search, out, command, limit, needles)
    show(report, as_json)


@app.command()
def people(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/people.json"),
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Sentence embeddings. Default: MiniLM.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What does an adapter of one's own bring, and where had it best come from? On people that nothing was trained on.

    In: a set of `molora train people`; what there is of a pool of pieces (on top of the task's adapter, if that is
    given), a network for profiles, and the task's adapter. Out: a JSON file with, for the base, for adapters trained on
    each history, put together from pieces or anchors, or made of profiles, for the same of other people, and for a
    search or a profile in the prompt: loss, accuracy or ROUGE with intervals over people, loss on unrelated text,
    seconds and bytes. What is finished is kept beside the file: an interrupted table goes on.

    Settings: people, pool, net, task, data, general, limit, questions, found, learning_rates, fit_learning_rates,
    epochs, batch_tokens, at_once, batch, new_tokens, seed.

    Example: molora eval people people=raters pool=pieces net=profile-net new_tokens=6
    """
    with extra("train"), extra("personalize"):
        from molora.personalize.embeddings import DEFAULT_ENCODER, SentenceEncoder
        from molora_training.people_settings import PeopleSettings
        from molora_training.people_table import run
        from molora_training.settings import load_settings

        settings = load_settings(PeopleSettings, config, overrides or ())
        command = command_line("eval people", config, overrides)
        name = encoder or DEFAULT_ENCODER
        report = run(settings, SentenceEncoder(name), out, command, name)
    if as_json:
        write_json(report)
        return
    for row in report["rows"]:
        figures = ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", "accuracy", "mae", "rouge_l") if name in row)
        typer.echo(f"{row['contender']:<42} {figures}")
    show(report, as_json)


@app.command()
def conversations(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="One user's conversations as JSON Lines, in the order they were had. Default: made up of texts with "
            "questions, from `molora train data passages`.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[str, typer.Option(help="Whose they are.")] = "ada",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/conversations.json"),
    base: Annotated[str | None, typer.Option(help="Folder or Hub id. Default: the starter's.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Conversations that are learnt, one by one.")] = 100,
    encoder: EncoderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Does an adapter know what was talked about? Many conversations are learnt one by one, then asked about.

    In: a file of conversations; those after the first `count` are not learnt, and their topics are asked about too.
    Out: a JSON file with the accuracy on questions whether something was discussed, and what is said of it, of the
    adapter, of a search over the conversations, of both and of the base; by the age of what is asked. What is finished
    is kept beside the file: an interrupted table goes on.

    Example: molora eval conversations chats.jsonl --user ada
    """
    with extra("train"), extra("personalize"):
        from molora.base import DEFAULT_BASE
        from molora.personalize.embeddings import DEFAULT_ENCODER, SentenceEncoder
        from molora_training.data import data_dir
        from molora_training.data.lessons import read_lessons
        from molora_training.plum.conversations import about_texts, read_conversations
        from molora_training.plum_table import run

        if file is None:
            every = about_texts(read_lessons(data_dir() / "passages.test.jsonl"))
        else:
            every = read_conversations(file, user)
        command = "molora eval conversations" + (f" {file.name} --user {user}" if file is not None else "")
        command += f" --count {count}" * (count != 100)
        name = encoder or DEFAULT_ENCODER
        report = run(every, out, command, SentenceEncoder(name), base or DEFAULT_BASE, count, encoder_name=name)
    if as_json:
        write_json(report)
        return
    for row in report["rows"]:
        figures = f"{row['accuracy']:.1%} of closed questions right, ROUGE-L of open ones {row['open_positives']:.3f}"
        typer.echo(f"{row['contender']:<20} {figures}")
    show(report, as_json)


@app.command()
def merges(
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/merges.json"),
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the ways, the I-th (from 0).")
    ] = "0/1",
    as_json: JsonOption = False,
) -> None:
    """What is left of several adapters when they are made one? Every way of merging, beside routing and each alone.

    In: a saved MoLoRA and data of its adapters. Out: a JSON file with, for 2, 4 and 8 of them and each way, the share
    of the adapters' own gains over the base that is kept, losses, the error against the exact sum, seconds and bytes.
    What is finished is kept beside the file: an interrupted table goes on, and is written once every share has run.

    Settings: model, layer, data, counts, limit, densities, soup_rows, soup_steps, batch_tokens, seed.

    Example: molora eval merges model=my-molora
    """
    with extra("train"):
        from molora_training.merge_table import MergeTableSettings, run
        from molora_training.settings import load_settings

        settings = load_settings(MergeTableSettings, config, overrides or ())
        report = run(settings, out, command_line("eval merges", config, overrides), parse_share(share))
    if report is None:
        return
    if as_json:
        write_json(report)
        return
    for row in report["rows"]:
        typer.echo(f"{row['adapters']} {row['way']:<30} {row['gain_kept']:>7.1%} of the gain kept")
    show(report, as_json)
