"""``molora eval``: how well a stack and its router do."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from molora.commands.common import JsonOption, SelectOption, extra, parse_selection, write_json

app = typer.Typer(
    help='Measure a stack and its router. Needs the extra "train".\n\nExample: molora eval main',
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _group() -> None:
    """Measure a stack and its router."""


@app.command()
def main(
    model: Annotated[Path | None, typer.Argument(help="A saved MoLoRA. Default: the starter stack.")] = None,
    routers: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Saved MoLoRAs whose routers are compared too.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("docs/results/main.json"),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens in one forward.")] = 8192,
    limit: Annotated[int, typer.Option(min=0, help="Sequences of each set; 0: all.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The main table: loss of every contender on held-out single-domain and mixed text.

    In: a saved MoLoRA, and the data of `molora train data`. Out: a JSON file with a row for the base, each adapter
    alone, the uniform merge, the oracles, and the router(s), and whether each bar is reached.

    Example: molora eval main --limit 20
    """
    with extra("train"):
        from molora.starter import starter_folder
        from molora_training.data import data_dir
        from molora_training.main_table import run

        folder = model or starter_folder()
        command = "molora eval main" + (" --routers runs/starter/routers" if routers else "")
        command += f" --limit {limit}" if limit else ""
        report = run(folder, routers, data or data_dir(), out, command, batch_tokens, limit)
    show(report, as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        write_json(report)
        return
    for line in report["must"]:
        typer.echo(
            f"{'reached' if line['holds'] else 'missed '}  {line['name']}: {line['value']:.3f} (bar {line['bar']})"
        )


def parse_share(text: str) -> tuple[int, int]:
    mine, slash, of = text.partition("/")
    if not (slash and mine.isdigit() and of.isdigit() and int(mine) < int(of)):
        raise typer.BadParameter(f"{text!r} is no share: give for example 0/4, 1/4, 2/4 and 3/4.")
    return int(mine), int(of)


@app.command()
def quality(
    model: Annotated[Path | None, typer.Argument(help="A saved MoLoRA. Default: the starter stack.")] = None,
    routers: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Saved MoLoRAs whose routers are compared too.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/quality.json"),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens in one forward.")] = 8192,
    limit: Annotated[int, typer.Option(min=0, help="Sequences of each set; 0: all.")] = 0,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes that share the table, the I-th (from 0).")
    ] = "0/1",
    split: Annotated[str, typer.Option(help="test, or validation: routers and adapters alone, to choose by.")] = "test",
    as_json: JsonOption = False,
) -> None:
    """Does routing by token pay? The router beside merges and rivals, on text that changes its domain in four ways.

    In: a saved MoLoRA, and the data of every adapter in its domain layer (`molora train data`). Out: a JSON file with
    a row for the base, each adapter alone, the label oracle, one adapter on all data where the stack has it, merges
    (uniform, linear, TIES, DARE, by magnitude), a classifier and centroids by sequence and by turn, and the router(s);
    and whether each bar is reached. Rows lie in a hidden folder beside it, so an interrupted table goes on; it
    is written with the rows so far, and the names of those that are missing.

    Example: molora eval quality --limit 20
    """
    with extra("train"):
        from molora.starter import starter_folder
        from molora_training.data import data_dir
        from molora_training.quality_table import run

        command = "molora eval quality" + (f" {model}" if model else "") + (f" --routers {routers}" if routers else "")
        command += f" --limit {limit}" if limit else ""
        if split not in ("test", "validation"):
            raise typer.BadParameter(f"{split!r} is not a split to measure on: test or validation.")
        command += f" --split {split}" if split != "test" else ""
        report = run(
            model or starter_folder(), data or data_dir(), out, command, routers=routers, limit=limit,
            batch_tokens=batch_tokens, share=parse_share(share), split=cast(Any, split),
        )  # fmt: skip
    if report is None:
        typer.echo("This process has done its share; the base or the label oracle is another one's.")
        return
    show(report, as_json)
    if "best" in report and not as_json:
        typer.echo(f"The lowest loss of a router at top-1: {report['best']}.")
    if report["missing"]:
        typer.echo(f"Not measured yet: {', '.join(report['missing'])}.", err=True)


@app.command()
def adding(
    few: Annotated[Path, typer.Argument(help="A saved MoLoRA whose router was trained without some adapters.")],
    full: Annotated[Path, typer.Argument(help="One with all of them, whose router was trained on all.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/adding.json"),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens in one forward.")] = 8192,
    limit: Annotated[int, typer.Option(min=0, help="Sequences of each set; 0: all.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What does a later adapter cost? Its row of the router from 32, 128 and 512 examples, beside a retrain.

    In: two saved MoLoRAs. Out: a JSON file with the share of tokens that go to their own domain and the loss, by
    domain, and whether each bar is reached.

    Example: molora eval adding runs/quality/routers/without-two runs/quality/stack
    """
    with extra("train"):
        from molora_training.adding import run
        from molora_training.data import data_dir

        command = f"molora eval adding {few} {full}" + (f" --limit {limit}" if limit else "")
        report = run(few, full, data or data_dir(), out, command, limit, batch_tokens)
    show(report, as_json)


@app.command()
def scale(
    routers: Annotated[Path, typer.Argument(help="A folder of saved MoLoRAs for fewer and for more adapters.")],
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data in MoLoRA's cache.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/scale.json"),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens in one forward.")] = 8192,
    limit: Annotated[int, typer.Option(min=0, help="Conversations of each set; 0: all.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """How does routing scale? Accuracy and loss of routers for more and more adapters.

    In: saved MoLoRAs, each with the adapters of the smallest and more. Out: a JSON file with the share of the gap to
    the label oracle that each router closes, on text of all its domains and on that of the smallest one's, and the
    share of tokens that go to their own domain and to one of its family.

    Example: molora eval scale runs/many/routers
    """
    with extra("train"):
        from molora_training.data import data_dir
        from molora_training.scale import run

        command = f"molora eval scale {routers}" + (f" --limit {limit}" if limit else "")
        report = run(routers, data or data_dir(), out, command, limit, batch_tokens)
    if as_json:
        write_json(report)
        return
    for row in report["rows"]:
        closed, right = row["own"]["gap_closed"], row["right"]
        typer.echo(f"{row['adapters']} adapters: {closed:.1%} of the gap closed, {right:.1%} of answer tokens right")


@app.command()
def harness(
    model: Annotated[Path | None, typer.Argument(help="A saved MoLoRA. Default: the starter stack.")] = None,
    benchmarks: Annotated[
        list[str] | None, typer.Option("--benchmark", "-b", metavar="NAME", help="Again for more. Default: all.")
    ] = None,
    select: SelectOption = None,
    tasks: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the task files go.")] = Path("runs/benchmarks"),
    limit: Annotated[int, typer.Option(min=0, help="Questions of each benchmark; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: JsonOption = False,
) -> None:
    """Public benchmarks through lm-evaluation-harness, on held-out questions (by id hash).

    Needs the extra "eval". In: a saved MoLoRA. Out: accuracy with its standard error; task files that the harness's own
    command reads too (`--include_path`).

    Example: molora eval harness -b sciq -b medmcqa --select domain=medicine --limit 100
    """
    with extra("eval"):
        from molora.starter import starter_folder
        from molora_training.data.benchmarks import BENCHMARKS, write_benchmarks
        from molora_training.harness import MoLoRALM, evaluate

        names = benchmarks or list(BENCHMARKS)
        counts = write_benchmarks(tasks, names)
        chosen = parse_selection(select or ["domain=auto"])
        routed = MoLoRALM(model or starter_folder(), chosen, batch_size=batch_size)
        found = evaluate(routed, tasks, names, limit or None)
    if as_json:
        write_json({name: {**row, "left_out_for_overlap": counts[name][1]} for name, row in found.items()})
        return
    for name, row in found.items():
        metric = "acc" if "acc" in row else "exact_match"
        typer.echo(f"{name:14} {row[metric]:.3f} +- {row.get(metric + '_stderr', float('nan')):.3f}  of {row['n']:.0f}")


@app.command()
def headline(
    model: Annotated[Path, typer.Argument(help="A saved MoLoRA, whose stack's defaults act.")],
    other: Annotated[Path, typer.Argument(help="A larger model for transformers, a folder.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go.")] = Path("runs/headline.json"),
    tasks: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the task files go.")] = Path("runs/benchmarks"),
    limit: Annotated[int, typer.Option(min=0, help="Questions of each benchmark; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    as_json: JsonOption = False,
) -> None:
    """Is a small model with a stack better than a larger one without? Six benchmarks, through lm-evaluation-harness.

    Needs the extra "eval". In: a saved MoLoRA and another model; task files that are there are not written anew. Out: a
    JSON file with the accuracies of the base, of the MoLoRA and of the other model, asked with the same prompts and
    through its own chat template, and the difference on the same questions with its 95% interval.

    Example: molora eval headline runs/quality/stack Qwen2.5-Coder-0.5B-Instruct
    """
    with extra("eval"):
        from molora_training.data.benchmarks import write_benchmarks
        from molora_training.headline import BENCHMARKS, run

        write_benchmarks(tasks, [name for name in BENCHMARKS if not (tasks / f"molora_{name}.yaml").is_file()])
        command = f"molora eval headline {model} {other.name}" + (f" --limit {limit}" if limit else "")
        report = run(model, other, tasks, out, command, limit, batch_size)
    show(report, as_json)
