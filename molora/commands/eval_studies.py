"""``molora eval continual``, ``federated``, ``stream`` and ``arrivals``: studies that keep what is finished."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import JsonOption, extra, write_json
from molora.commands.eval import app, parse_share, show


@app.command()
def continual(
    tasks: Annotated[list[str], typer.Argument(help="Domains with prepared data, two or more.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/continual.json"),
    base: Annotated[str | None, typer.Option(help="Base of the adapter. Default: the starter's.")] = None,
    orders: Annotated[int, typer.Option(min=1, help="Orders of the tasks.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each order.")] = 3,
    examples: Annotated[int, typer.Option(min=8, help="Conversations of each task to learn.")] = 256,
    tests: Annotated[int, typer.Option(min=8, help="Conversations of each task to score by.")] = 100,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the runs, the I-th (from 0).")
    ] = "0/1",
    as_json: JsonOption = False,
) -> None:
    """What does an adapter forget that learns one task after another? Methods beside joint and sequential training.

    In: the data of `molora train data`. Out: a JSON file with average accuracy, forgetting, backward and forward
    transfer, time and kept bytes of each method, over orders and seeds. What is finished is kept beside the file: an
    interrupted study goes on, and is written once every share has run.

    Example: molora eval continual math code medicine law --orders 1 --seeds 1 --examples 64
    """
    with extra("train"):
        from molora.base import DEFAULT_BASE
        from molora_training.continual.study import StudySettings, run
        from molora_training.data import data_dir

        settings = StudySettings(
            tuple(tasks), data or data_dir(), base or DEFAULT_BASE, orders, seeds, examples, tests=tests
        )
        command = f"molora eval continual {' '.join(tasks)}"
        given = {"orders": (orders, 3), "seeds": (seeds, 3), "examples": (examples, 256), "tests": (tests, 100)}
        command += _changed(given)
        report = run(settings, out, command, parse_share(share))
    if report is not None:
        show(report, as_json)


@app.command()
def federated(
    clients: Annotated[list[str], typer.Argument(help="Names of prepared data, one for each client, three or more.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/federated.json"),
    base: Annotated[str | None, typer.Option(help="Base of the adapter. Default: the starter's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 20,
    examples: Annotated[int, typer.Option(min=1, help="Conversations that a client learns in a round.")] = 32,
    tests: Annotated[int, typer.Option(min=1, help="Conversations of each client to score by.")] = 24,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the runs, the I-th (from 0).")
    ] = "0/1",
    as_json: JsonOption = False,
) -> None:
    """What do clients learn together that none may show? Ways of federated training beside central training.

    In: the data of `molora train data many`. Out: a JSON file with the loss on the clients' test conversations, bytes,
    seconds and peak memory: of FlexLoRA with ranks of 4 to 32 and with equal ones, of other ways of putting updates
    together, of each client alone, of all text in one place, of differential privacy at epsilon 8 and 1, and of clients
    without backpropagation in equal time. What is finished is kept beside the file: an interrupted study goes on, and
    is written once every share has run. Privacy needs the extra "federated".

    Example: molora eval federated speech-barack-obama speech-james-polk speech-jimmy-carter --seeds 1 --rounds 5
    """
    with extra("train"):
        from molora.base import DEFAULT_BASE
        from molora_training.data import data_dir
        from molora_training.federated.settings import LocalSettings
        from molora_training.federated.study import StudySettings, run

        settings = StudySettings(
            tuple(clients), data or data_dir(), base or DEFAULT_BASE, seeds, rounds,
            local=LocalSettings(examples=examples, batch_tokens=2048, max_length=512), tests=tests,
        )  # fmt: skip
        command = f"molora eval federated {' '.join(clients)}"
        given = {"seeds": (seeds, 3), "rounds": (rounds, 20), "examples": (examples, 32), "tests": (tests, 24)}
        report = run(settings, out, command + _changed(given), parse_share(share))
    if report is not None:
        show(report, as_json)


@app.command()
def stream(
    users: Annotated[list[str], typer.Argument(help="Names of prepared data, one for each user.")],
    general: Annotated[str, typer.Option(metavar="NAME", help="Prepared data that has nothing to do with them.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/stream.json"),
    base: Annotated[str | None, typer.Option(help="Base of the adapters. Default: the starter's.")] = None,
    updates: Annotated[int, typer.Option(min=2, help="Updates of each user.")] = 10,
    conversations: Annotated[int, typer.Option(min=5, help="New ones of each update.")] = 20,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the users, the I-th (from 0).")
    ] = "0/1",
    as_json: JsonOption = False,
) -> None:
    """What do updates do to users over time? A stream of `molora update` for each, with its gate.

    In: the data of `molora train data`. Out: a JSON file with, for each user, how many updates serve, what they brought
    and cost, and what in the end became of what was learnt first. What is finished is kept beside the file.

    Example: molora eval stream speech-barack-obama speech-james-polk --general science
    """
    with extra("train"):
        from molora.base import DEFAULT_BASE
        from molora_training.continual.stream import StreamSettings, run
        from molora_training.data import data_dir

        settings = StreamSettings(
            tuple(users), general, data or data_dir(), base or DEFAULT_BASE, updates, conversations
        )
        command = f"molora eval stream {' '.join(users)} --general {general}"
        given = {"updates": (updates, 10), "conversations": (conversations, 20)}
        command += _changed(given)
        report = run(settings, out, command, parse_share(share))
    if report is not None:
        show(report, as_json)


@app.command()
def arrivals(
    names: Annotated[list[str], typer.Argument(help="Names of prepared data, an adapter each, as they come.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/arrivals.json"),
    base: Annotated[str | None, typer.Option(help="Whose embeddings are read. Default: the starter's.")] = None,
    first: Annotated[int, typer.Option(min=2, help="How many are there from the beginning.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the trainings and of which leave.")] = 1,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the study, the I-th (from 0).")
    ] = "0/1",
    as_json: JsonOption = False,
) -> None:
    """What becomes of a router while adapters come and go? Ways to learn of a new one, beside training anew.

    In: the data of `molora train data`, for example of `many`. The first adapters are there from the beginning, the
    others come one by one, and after every third one leaves. Out: a JSON file with the share of tokens that go to
    their own adapter, with time and kept bytes. Needs no trained adapter and no GPU: the routers read embeddings. What
    is finished is kept beside the file.

    Example: molora eval arrivals gsm8k code-javascript winogrande medicine-surgery facts-science --first 2
    """
    with extra("train"):
        from molora.base import DEFAULT_BASE
        from molora_training.continual.arrivals import ArrivalSettings, run
        from molora_training.data import data_dir

        settings = ArrivalSettings(tuple(names), data or data_dir(), base or DEFAULT_BASE, first, seeds)
        command = f"molora eval arrivals {' '.join(names)}" + _changed({"first": (first, 8), "seeds": (seeds, 1)})
        report = run(settings, out, command, parse_share(share))
    if report is None:
        return
    if as_json:
        write_json(report)
        return
    for row in report["rows"]:
        last = row["points"][-1]
        typer.echo(f"{row['way']:<16} first {last['first']:.1%}, came {last['came']:.1%}, mixed {last['mixed']:.1%}")


def _changed(given: dict[str, tuple[int, int]]) -> str:
    """The options of a command line that are not what they are by default: name -> (value, default)."""
    return "".join(f" --{name} {value}" for name, (value, usual) in given.items() if value != usual)
