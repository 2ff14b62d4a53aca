"""``molora bench``: measurements of one machine."""

import math
from typing import Annotated, Any

import typer

from molora.commands.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    extra,
    hide_loading_bars,
    model_place,
    open_model,
    write_json,
)
from molora.errors import ConfigError

app = typer.Typer(
    help="Measure speed on this machine.\n\nExample: molora bench decode --json",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


# What comes, for both commands that replay it.
RateOption = Annotated[float, typer.Option(min=0, help="Requests a second on average; 0: all at once.")]
CvOption = Annotated[float, typer.Option(min=0.1, help="How unevenly they come; 1: as in a Poisson process.")]
UsersOption = Annotated[int, typer.Option(min=1, help="Each has an adapter.")]
ZipfOption = Annotated[float, typer.Option(min=0, help="How much more the first users ask; 0: all alike.")]
PromptOption = Annotated[str, typer.Option(metavar="LEAST:MOST", help="Tokens of a prompt.")]
AnswerOption = Annotated[str, typer.Option(metavar="LEAST:MOST", help="Tokens of an answer.")]


@app.command()
def decode(model: ModelArgument = None, as_json: JsonOption = False, dtype: DtypeOption = Dtype.bfloat16) -> None:
    """Compare the pace of greedy decoding at batch 1: the bare base, MoLoRA, and PEFT's X-LoRA.

    MoLoRA has all its layers on: those that the router decides on auto, the first adapter of each other one. X-LoRA
    gets the same number of adapters and fewer tokens, for it computes the whole sequence twice for each. All three are
    measured in turns, and the median counts. Needs the extra "train" (PEFT).

    Example: molora bench decode --json > decode.json
    """
    with extra("train"):
        from molora.bench import measure_decode

        hide_loading_bars()
        record = measure_decode(model_place(model), dtype.value)
    if as_json:
        write_json(record)
    else:
        _print(record)


@app.command()
def serve(
    model: ModelArgument = None,
    requests: Annotated[int, typer.Option(min=1, help="How many come.")] = 100,
    rate: RateOption = 2.0,
    cv: CvOption = 1.0,
    users: UsersOption = 100,
    zipf: ZipfOption = 1.0,
    prompt: PromptOption = "8:128",
    answer: AnswerOption = "8:64",
    rows: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 8,
    live: Annotated[int, typer.Option(min=1, help="Adapters that are in the model at once.")] = 32,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the users' adapters.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ask a server that runs there, of OpenAI's API, in place of a model here: http://127.0.0.1:8000.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="With --url: the model to ask for; {user} stands for the number of who asks.")
    ] = "base",
    key: Annotated[str, typer.Option(envvar="MOLORA_API_KEY", help="With --url: the API key.")] = "",
    as_json: JsonOption = False,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Replay requests of many users: tokens a second, waiting times, and how often an adapter was there.

    They are replayed twice: with one adapter for all users, and with each user's own, which are brought when they are
    asked for. The users' adapters are random; what they hold changes no time. With --url they are replayed once, at a
    server that runs, with the models that it has.

    Example: molora bench serve --users 1000 --rate 4 --live 64

    Example: molora bench serve --url http://127.0.0.1:8000 --name "base+user/u{user}" --users 20
    """
    from rich.console import Console
    from rich.progress import Progress

    from molora.serve.measure import measure_at, measure_serve
    from molora.serve.traffic import Traffic

    lengths = {"prompt": token_range(prompt), "answer": token_range(answer)}
    traffic = Traffic(requests, rate or math.inf, cv, users, zipf, seed=seed, **lengths)
    given = {"requests": requests, "rate": rate, "cv": cv, "users": users, "zipf": zipf, "prompt": prompt,
             "answer": answer, "seed": seed}  # fmt: skip
    console = Console(stderr=True)
    if url is not None:
        with extra("serve"), Progress(console=console, transient=True) as progress:
            bar = progress.add_task("answers", total=requests)
            record = measure_at(url.rstrip("/"), name, traffic, key, lambda: progress.advance(bar))
        given |= {"url": url, "name": name}
    else:
        opened = open_model(model, dtype)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("answers", total=2 * requests)
            record = measure_serve(opened, traffic, rows=rows, live=live, rank=rank, tick=lambda: progress.advance(bar))
        given |= {"rows": rows, "live": live, "rank": rank}
    record["command"] = " ".join(["molora bench serve", *(f"--{name} {value}" for name, value in given.items())])
    if as_json:
        write_json(record)
    else:
        _print_serve(record)


def token_range(text: str) -> tuple[int, int]:
    """The fewest and most tokens of "8:64".

    Raises:
        ConfigError: it has another form.
    """
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"{text!r} is no range of tokens: write it as 8:64.")
    return found


def _print_serve(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    remote = "address" in record
    last = ("refused", "failed") if remote else ("read", "live")
    for heading in ("tokens/s", "requests/s", "first token p50", "p99", "between tokens p50", "p99", *last):
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        if remote:
            counts = [str(row["refused"]), str(row["failed"])]
        else:
            pool = row["pool"]
            counts = [f"{pool['reads']}", f"{pool['live_hits'] / max(1, pool['live_hits'] + pool['host_hits']):.0%}"]
        if not row["answered"]:
            table.add_row(row["kind"], *[""] * 6, *counts)
            continue
        first, between = row["seconds to the first token"], row["seconds between tokens"]
        times = [milliseconds(one, share) for one in (first, between) for share in ("p50", "p99")]
        paces = [f"{row['tokens a second']:.1f}", f"{row['requests a second']:.2f}"]
        table.add_row(row["kind"], *paces, *times, *counts)
    console = Console(highlight=False)
    console.print(table)
    if remote:
        console.print(
            f"\n{record['traffic']['requests']} requests to {record['address']}, asked from {record['machine']}"
        )
        return
    console.print(
        f"\nWith their own adapters {record['ratio']:.0%} of the pace with one. read: adapters from disk; live: "
        f"requests that found theirs in the model. {record['machine']}, {record['threads']} threads"
    )


def milliseconds(times: dict[str, float], share: str) -> str:
    """A percentile for a table."""
    return f"{times[share] * 1000:,.0f} ms" if times else ""


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in ("tokens/s", "of the base", "tokens", "runs"):
        table.add_column(heading, justify="right")
    pace = record["tokens_per_second"]
    for name, value in pace.items():
        runs = len(record["runs"][name])
        table.add_row(name, f"{value:.2f}", f"{value / pace['base']:.0%}", str(record["tokens"][name]), str(runs))
    console = Console(highlight=False)
    console.print(table)
    machine = f"{record['machine']}, {record['threads']} threads, torch {record['torch']}, {record['dtype']}"
    console.print(f"\nMoLoRA is {record['ratios']['molora_to_xlora']:.1f} times as fast as X-LoRA. {machine}")
