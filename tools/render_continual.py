"""The section of docs/results.md about updates over time, from docs/results/continual.json and stream.json."""

from pathlib import Path
from typing import Any

from tools.pictures import PALETTE, pyplot, save
from tools.render_kernels import bars

Row = dict[str, Any]
PICTURE = "continual.svg"


def section(report: Row) -> list[str]:
    """Lines of Markdown about a sequence of tasks."""
    joint, *rows = report["rows"]
    parts = [
        "## What does an adapter forget over a sequence of tasks?",
        "",
        f"{_measured(report)} A score is the percentage of the answers' tokens that are found likeliest. Average, "
        "forgetting, backward and forward transfer are means over orders and seeds, with the lowest and the highest; "
        "seconds are an update's, and bytes all that is kept beside the adapter at the end.",
        "",
        f"![Average score over the tasks so far, by method](images/{PICTURE})",
        "",
        "| method | average | of joint training's | forgetting | backward | forward | seconds an update | text kept | "
        "other bytes kept | rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| {joint['method']} | {joint['average']:.2f} | 100.0% | | | | | | | |",
    ]  # fmt: skip
    for row in rows:
        parts.append(
            f"| {row['method']} | {_range(row, 'average')} | {row['average'] / joint['average']:.1%} | "
            f"{_range(row, 'forgetting')} | {row['backward']:+.2f} | {row['forward']:+.2f} | "
            f"{row['update_seconds']:.0f} | {row['text_bytes']:,.0f} | {row['state_bytes']:,.0f} | {row['rank']:.0f} |"
        )
    return [*parts, "", *bars(report["must"]), ""]


def stream(report: Row) -> list[str]:
    """Lines of Markdown about users."""
    many = report["settings"]["updates"]
    parts = [
        "## What do updates do to users?",
        "",
        f"{_measured(report)} Loss on new conversations is that of those that are never learnt, by an update, promoted "
        "or not; *since it was new* compares the version that serves in the end with the one that served when each "
        "part was new.",
        "",
        f"| user | updates that serve, of {many} | loss on new conversations | since it was new | on general text | "
        "seconds an update | text kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        drift = "" if row["drift"] is None else f"{row['drift']:+.1%}"
        parts.append(
            f"| {row['user']} | {row['promoted']} | {row['learnt']:+.1%} | {drift} | {row['general']:+.1%} | "
            f"{row['update_seconds']:.0f} | {row['text_bytes']:,} |"
        )
    return [*parts, "", *bars(report["must"]), ""]


def draw(report: Row, folder: Path) -> None:
    """The picture of :func:`section`."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.8))
    joint, *rows = report["rows"]
    steps = range(1, len(rows[0]["curve"]) + 1)
    axes.axhline(joint["average"], color="black", linewidth=1, linestyle=":", label=joint["method"])
    for number, row in enumerate(rows):
        line = "-" if row["keeps_text"] else "--"
        axes.plot(steps, row["curve"], line, marker="o", color=PALETTE[number % len(PALETTE)], label=row["method"])
    axes.set(xlabel="tasks learnt", ylabel="average score on them, %")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / PICTURE)


def _measured(report: Row) -> str:
    return (
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}. "
        f"Data: {report['data']}."
    )


def _range(row: Row, what: str) -> str:
    low, high = row[f"{what}_range"]
    return f"{row[what]:.2f} [{low:.2f}, {high:.2f}]"
