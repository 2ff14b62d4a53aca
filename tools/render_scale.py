"""The section of docs/results.md about routing among more and more adapters, from docs/results/scale.json."""

from pathlib import Path
from typing import Any

from tools.pictures import PALETTE, pyplot, save

Row = dict[str, Any]
PICTURE = "scale.svg"
TEXTS = {"own": "text of all its domains", "shared": "text of the fewest domains"}


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    fewest = len(report["fewest"])
    parts = [
        "## How does routing scale with the number of adapters?",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. Small domains cut out of the others, many of them near to one "
        "another; a family is what is named alike up to the first dash (speeches, languages of one task, subjects of "
        "medicine). Brackets hold 95% bootstrap intervals over conversations; seconds are of the router's training.",
        "",
        f"![Share of the gap closed, and tokens that go right, by number of adapters](images/{PICTURE})",
        "",
        "| adapters | gap closed | base, oracle, router (nats) | gap closed on text of the "
        f"{fewest} | answer tokens right | in the right family | router: parameters, seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        own, shared = row["own"], row["shared"]
        losses = ", ".join(f"{own[name]:.3f}" for name in ("base", "oracle", "router"))
        parts.append(
            f"| {row['adapters']} | {_closed(own)} | {losses} | {_closed(shared)} | {row['right']:.1%} | "
            f"{row['right_family']:.1%} | {row['parameters']:,}, {row['seconds']:.0f} ({row['machine']}) |"
        )
    return [*parts, ""]


def draw(report: Row, folder: Path) -> None:
    """The picture of :func:`section`."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.4))
    rows = report["rows"]
    counts = [row["adapters"] for row in rows]
    for number, (name, label) in enumerate(TEXTS.items()):
        values = [100 * row[name]["gap_closed"] for row in rows]
        axes.plot(counts, values, marker="o", color=PALETTE[number], label=f"gap closed, {label}")
    for number, (name, label) in enumerate({"right": "right", "right_family": "in the right family"}.items(), 2):
        values = [100 * row[name] for row in rows]
        axes.plot(counts, values, marker="s", linestyle="--", color=PALETTE[number], label=f"answer tokens {label}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set(xlabel="adapters", ylabel="%", ylim=(0, 105))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / PICTURE)


def _closed(of: Row) -> str:
    low, high = of["gap_closed_interval"]
    return f"{of['gap_closed']:.1%} [{low:.1%}, {high:.1%}]"
