"""``molora bench costs`` and ``molora bench simulate``: how many machines a service needs, before there are any."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from molora.commands.bench import (
    AnswerOption,
    CvOption,
    PromptOption,
    RateOption,
    UsersOption,
    ZipfOption,
    app,
    milliseconds,
    token_range,
)
from molora.commands.common import Dtype, DtypeOption, JsonOption, ModelArgument, open_model, write_json


@app.command()
def costs(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("costs.json"),
    rows: Annotated[int, typer.Option(min=1, help="Most sequences that run at once; halves of it are timed, too.")] = 8,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the users' adapters.")] = 16,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Time what serving costs on this machine: steps, prompts, and bringing adapters.

    The engine of `molora serve` runs for a minute or so with random adapters. Nothing else should run meanwhile. The
    file is what `molora bench simulate` reads.

    Example: molora bench costs my-molora --out costs.json
    """
    from molora.serve.costs import measure_costs, write_costs

    numbers = [rows]
    while numbers[0] > 1:
        numbers.insert(0, numbers[0] // 2)
    write_costs(measure_costs(open_model(model, dtype), rows=numbers, rank=rank), out)
    typer.echo(f"The costs of this machine are in {out}.", err=True)


@app.command()
def simulate(
    costs: Annotated[Path, typer.Argument(metavar="COSTS", help="The file that `molora bench costs` wrote.")],
    replicas: Annotated[int, typer.Option(min=1, help="How many, each on a machine as the costs are of.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="How many come.")] = 10000,
    rate: RateOption = 2.0,
    cv: CvOption = 1.0,
    users: UsersOption = 100,
    zipf: ZipfOption = 1.0,
    prompt: PromptOption = "8:128",
    answer: AnswerOption = "8:64",
    rows: Annotated[int, typer.Option(min=1, help="Sequences that run at once in a replica.")] = 8,
    live: Annotated[int, typer.Option(min=1, help="Adapters that are in a replica's model at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON file for the result.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate `molora serve --ray` with any number of machines and users, by costs that were measured on one.

    Requests come as in `molora bench serve`. The replicas batch, wait, bring adapters and refuse as the real ones do,
    and requests are placed by the same rule; only the time that each thing takes is from the file.

    Example: molora bench simulate costs.json --replicas 100 --users 1000000 --requests 100000 --rate 50
    """
    from molora.serve.costs import read_costs
    from molora.serve.simulate import simulated
    from molora.serve.traffic import Traffic

    lengths = {"prompt": token_range(prompt), "answer": token_range(answer)}
    traffic = Traffic(requests, rate or math.inf, cv, users, zipf, seed=seed, **lengths)
    record = simulated(read_costs(costs), traffic, replicas=replicas, rows=rows, live=live)
    given = {"replicas": replicas, "requests": requests, "rate": rate, "cv": cv, "users": users, "zipf": zipf,
             "prompt": prompt, "answer": answer, "rows": rows, "live": live, "seed": seed}  # fmt: skip
    told = " ".join(["molora bench simulate", costs.name, *(f"--{name} {value}" for name, value in given.items())])
    record = {"command": told, **record}
    if out is not None:
        from molora.atomic import write_text

        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(record, indent=1) + "\n")
    if as_json:
        write_json(record)
    else:
        _print(record)


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "p50", "p95", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    (row,) = record["rows"]
    for name in ("seconds to the first token", "seconds between tokens"):
        if times := row.get(name):
            table.add_row(name.removeprefix("seconds "), *(milliseconds(times, share) for share in times))
    console = Console(highlight=False)
    console.print(table)
    pace = "" if "seconds" not in row else (
        f"{row['tokens a second']:,.1f} tokens/s, {row['requests a second']:,.2f} requests/s. Replicas busy "
        f"{row['busy']:.0%} of the time; {row['live']:.0%} of requests found their adapter in the model, "
        f"{row['read']:,} adapters were read. "
    )  # fmt: skip
    console.print(f"\n{pace}{row['refused']:,} of {row['asked']:,} requests refused. Simulated: {record['machine']}")
