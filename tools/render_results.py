"""Writes docs/results.md and its pictures from docs/results/*.json, so that page and figures cannot disagree.

python -m tools.render_results
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import plots
from tools import (
    render_choice,
    render_composition,
    render_continual,
    render_conversations,
    render_documents,
    render_headline,
    render_kernels,
    render_memory,
    render_people,
    render_quality,
    render_scale,
    render_serving,
)
from tools.pictures import PALETTE, pyplot, save

DOCS = Path(__file__).parent.parent / "docs"
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "validation": render_choice.section,
    "router-memory": render_memory.section,
    "scale": render_scale.section,
    "headline": render_headline.section,
    "continual": render_continual.section,
    "stream": render_continual.stream,
    "arrivals": render_continual.arrivals,
    "documents-passages": render_documents.section,
    "people-raters": render_people.section,
    "people-presidents": render_people.section,
    "conversations": render_conversations.section,
    "merges": render_composition.merges,
    "compress": render_composition.compress,
    "compress-unrelated": render_composition.unrelated,
    "compressed-pace": render_composition.pace,
    "chats": render_serving.chats,
    "serve": render_serving.serve,
    "soak": render_serving.soak,
}
SEEDS = ("quality-seed-1", "quality-seed-2")
LATER = ("quality", "adding", *SEEDS, *SECTIONS)
MARKS = ("<!-- results -->", "<!-- /results -->")


def main(docs: Path = DOCS) -> None:
    """Renders every page and picture of ``docs``, and the table in the README beside it."""
    report = json.loads((docs / "results" / "main.json").read_text(encoding="utf-8"))
    speed = json.loads((docs / "results" / "decode.json").read_text(encoding="utf-8"))
    kernels = read_report("kernels", docs)
    later = {name: read_report(name, docs) for name in LATER}
    quality, scale = later["quality"], later["scale"]
    (docs / "results.md").write_text(page(report, speed, kernels, later), encoding="utf-8")
    readme = docs.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    table = readme_table(report, speed)
    readme.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")
    draw_routes(report["example"], docs / "images" / "routes.svg")
    draw_gap(report, docs / "images" / "gap.svg")
    if quality:
        render_quality.draw(quality, docs / "images")
    if scale:
        render_scale.draw(scale, docs / "images")
    if continual := later["continual"]:
        render_continual.draw(continual, docs / "images")
    if arrivals := later["arrivals"]:
        render_continual.draw_arrivals(arrivals, docs / "images")
    if kernels:
        plots.draw(kernels["rows"], docs / "images")


def read_report(name: str, docs: Path = DOCS) -> dict[str, Any] | None:
    """What was measured, if it was."""
    file = docs / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def readme_table(report: dict[str, Any], speed: dict[str, Any]) -> str:
    """The few lines of the README's table."""
    rows = {row["contender"]: row for row in report["rows"]}
    missed = not all(line["holds"] for line in [*report["must"], *speed["must"]])
    shown = ["base", "uniform merge", "per-sequence oracle", report["default"], "label oracle"]
    parts = [
        "| held-out text that changes its domain | nats a token | gap to the label oracle closed |",
        "|---|---|---|",
    ]
    for name in shown:
        row = rows[name]
        parts.append(f"| {name} | {row['mixed']:.3f} | {row['gap_closed']:.1%} |")
    parts += [
        "",
        f"`{report['command']}`, {report['machine']}, commit {report['commit']}. Decoding with three layers on keeps "
        f"{speed['ratios']['molora_to_base']:.0%} of the base's tokens/s and is "
        f"{speed['ratios']['molora_to_xlora']:.0f} times as fast as X-LoRA (`molora bench decode`, "
        f"{speed['machine']}, {speed['threads']} threads, commit {speed['commit']}). "
        "[All results](docs/results.md)" + (", the missed bars among them." if missed else "."),
    ]
    return "\n".join(parts)


def page(
    report: dict[str, Any],
    speed: dict[str, Any],
    kernels: dict[str, Any] | None,
    later: Mapping[str, dict[str, Any] | None] = MappingProxyType({}),
) -> str:
    """The Markdown of docs/results.md; ``later``: reports of LATER, those that there are."""
    domains = list(report["rows"][0]["single"])
    paces = speed["tokens_per_second"]
    parts = [
        "# Results",
        "",
        "Does routing by token pay, and at what price? Every figure on this page is rendered from",
        "`docs/results/*.json` by `python -m tools.render_results`.",
        "",
        "## Loss on held-out text: the shipped stack",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, "
        f"seed {report['seed']}. Data: {report['data']}. Nats for each answer token; prompts are paraphrased, about "
        "half of the test prompts use forms that no training prompt has. *Gap closed* is the share of the way from the "
        "base to the label oracle (each token at its own domain's adapter); brackets hold 95% bootstrap intervals over "
        "conversations.",
        "",
        "![Share of the gap closed](images/gap.svg)",
        "",
        f"| contender | mixed | gap closed | by domain mean | {' | '.join(domains)} |",
        "|---|---|---|---|" + "---|" * len(domains),
    ]
    parts += [row_line(row, domains, report["default"]) for row in report["rows"]]
    parts += [
        "",
        "The shipped default is in bold. Single-domain columns: loss on held-out text of that domain alone.",
        "",
    ]
    parts += ["### What had to be reached", "", *render_kernels.bars([*report["must"], *speed["must"]])]
    parts += [
        "",
        "### Tokens that go to their own domain, by position",
        "",
        *render_quality.positions(report["rows"], "right_by_position"),
        "",
    ]
    parts += ["### Prompt forms that training never saw", "", *unseen(report), ""]
    parts += [
        "### One conversation, token by token",
        "",
        "![Router probabilities along a mixed conversation](images/routes.svg)",
        "",
    ]
    if quality := later.get("quality"):
        parts += render_quality.section(
            quality,
            later.get("adding"),
            [one for name in SEEDS if (one := later.get(name))],
        )
    for name, section in SECTIONS.items():
        if found := later.get(name):
            parts += section(found)
    parts += [
        "## Decoding on two CPU cores",
        "",
        f"`{speed['command']}` on {speed['machine']}, commit {speed['commit']}, {speed['date']}, {speed['threads']} "
        f"threads, torch {speed['torch']}, {speed['dtype']}: greedy, batch 1, all three "
        f"layers of the starter stack on. {speed['note']}",
        "",
        "| | tokens/s | of the base |",
        "|---|---|---|",
        *[f"| {name} | {pace:.1f} | {pace / paces['base']:.2f} |" for name, pace in paces.items()],
        "",
    ]
    if kernels:
        parts += render_kernels.section(kernels)
    notes = DOCS / "results" / "notes.md"
    parts.append(notes.read_text(encoding="utf-8"))
    return "\n".join(parts).rstrip() + "\n"


def row_line(row: dict[str, Any], domains: list[str], default: str) -> str:
    """One contender's line of the table."""
    name = f"**{row['contender']}**" if row["contender"] == default else row["contender"]
    low, high = row["gap_closed_interval"]
    single = " | ".join(f"{row['single'][domain]:.3f}" for domain in domains)
    return (
        f"| {name} | {row['mixed']:.4f} | {row['gap_closed']:.1%} [{low:.1%}, {high:.1%}] "
        f"| {row['gap_closed_domain_mean']:.1%} | {single} |"
    )


def unseen(report: dict[str, Any]) -> list[str]:
    """The table of seen against unseen prompt forms."""
    table = report["unseen_forms"]
    names = list(next(iter(table.values())))
    lines = [f"| domain | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return lines + [f"| {d} | {' | '.join(f'{row[name]:.3f}' for name in names)} |" for d, row in table.items()]


def draw_routes(example: dict[str, Any], file: Path) -> None:
    """Router probabilities over one conversation, with the true domains as a band."""
    plt = pyplot()
    figure, (top, band) = plt.subplots(2, 1, figsize=(10, 3.6), height_ratios=[8, 1], sharex=True)
    names = [*example["domains"], "none"]
    columns = list(zip(*example["probabilities"], strict=True))
    top.stackplot(range(len(columns[0])), columns, labels=names, colors=PALETTE, linewidth=0)
    top.set(ylabel="router probability", ylim=(0, 1))
    top.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(names), frameon=False)
    colors = [PALETTE[label] for label in example["labels"]]
    band.bar(range(len(colors)), [1] * len(colors), width=1, color=colors)
    for at, answer in enumerate(example["answer"]):
        if answer:
            band.axvspan(at - 0.5, at + 0.5, 0, 0.25, color="black", linewidth=0)
    band.set(yticks=[], xlabel="token (band: true domain; black: answer)", xlim=(0, len(colors)))
    save(figure, file)


def draw_gap(report: dict[str, Any], file: Path) -> None:
    """Bars of the share of the gap closed."""
    plt = pyplot()
    rows = [row for row in report["rows"] if row["contender"] not in ("base", "label oracle")]
    rows = sorted(rows, key=lambda row: row["gap_closed"])
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(rows) + 0.8))
    kinds = {"router": PALETTE[0], "adapter": PALETTE[6]}
    axes.barh(
        [row["contender"] for row in rows],
        [100 * row["gap_closed"] for row in rows],
        color=[kinds.get(row["kind"], PALETTE[1]) for row in rows],
    )
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="% of the gap from base to label oracle, mixed text", xlim=(0, 105))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


if __name__ == "__main__":
    main()
