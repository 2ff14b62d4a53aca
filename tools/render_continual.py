"""The sections of docs/results.md about change over time, from continual.json, stream.json and arrivals.json."""

from pathlib import Path
from typing import Any

from tools.pictures import PALETTE, pyplot, save
from tools.render_kernels import bars

Row = dict[str, Any]
PICTURE = "continual.svg"
ARRIVALS = "arrivals.svg"


def section(report: Row) -> list[str]:
    """Lines of Markdown about a sequence of tasks."""
    joint, *rows = report["rows"]
    parts = [
        "## What does an adapter forget over a sequence of tasks?",
        "",
        f"{_measured(report)} A score is the percentage of the answers' tokens that are found likeliest. Average, "
        "forgetting, backward and forward transfer are means over orders and seeds, with the lowest and the highest; "
        "seconds are an update's, GiB its peak of a GPU's memory, and bytes all that is kept beside the adapter at the "
        "end.",
        "",
        f"![Average score over the tasks so far, by method](images/{PICTURE})",
        "",
        "| method | average | of joint training's | forgetting | backward | forward | seconds an update | GiB | "
        "text kept | other bytes kept | rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| {joint['method']} | {joint['average']:.2f} | 100.0% | | | | | | | | |",
    ]  # fmt: skip
    for row in rows:
        parts.append(
            f"| {row['method']} | {_range(row, 'average')} | {row['average'] / joint['average']:.1%} | "
            f"{_range(row, 'forgetting')} | {row['backward']:+.2f} | {row['forward']:+.2f} | "
            f"{row['update_seconds']:.0f} | {_gib(row['peak_bytes'])} | {row['text_bytes']:,.0f} | "
            f"{row['state_bytes']:,.0f} | {row['rank']:.0f} |"
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


def arrivals(report: Row) -> list[str]:
    """Lines of Markdown about a router while adapters come and go."""
    parts = [
        "## What becomes of a router while adapters come and go?",
        "",
        f"{_measured(report)} Share of the text's tokens that go to their own adapter in the end: of the adapters from "
        "the beginning that are still there, of those that came, and of text that changes its domain. *New text alone* "
        "trains the router on as it is; *examples* fits the new row to 128 of them; *sketches* trains it on all new "
        "text, with the router's samples against it; *replay* trains the router on the new text and on 64 examples of "
        "each other adapter; *trained anew* sees all text, after each departure.",
        "",
        f"![Share of mixed text's tokens that go right, over arrivals](images/{ARRIVALS})",
        "",
        "| how it learns | first | came | mixed | seconds an arrival | text kept | samples kept, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        last = row["points"][-1]
        parts.append(
            f"| {row['way']} | {last['first']:.1%} | {last['came']:.1%} | {last['mixed']:.1%} | "
            f"{row['update_seconds']:.0f} | {row['text_bytes']:,.0f} | {row['sample_bytes']:,.0f} |"
        )
    return [*parts, ""]


def draw_arrivals(report: Row, folder: Path) -> None:
    """The picture of :func:`arrivals`."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for number, row in enumerate(report["rows"]):
        values = [100 * point["mixed"] for point in row["points"]]
        axes.plot(range(len(values)), values, marker="o", color=PALETTE[number], label=row["way"])
    axes.set_xticks(range(len(report["rows"][0]["points"])))
    axes.set(xlabel="departures, each after three arrivals", ylabel="% of mixed text's tokens right", ylim=(0, 100))
    axes.legend(frameon=False, fontsize="small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / ARRIVALS)


def draw(report: Row, folder: Path) -> None:
    """The picture of :func:`section`."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8.4, 4.2))
    joint, *rows = report["rows"]
    steps = range(1, len(rows[0]["curve"]) + 1)
    axes.axhline(joint["average"], color="black", linewidth=1, linestyle=":", label=joint["method"])
    for number, row in enumerate(sorted(rows, key=lambda row: -row["curve"][-1])):  # in the order of the lines' ends
        line, marker = "-" if row["keeps_text"] else "--", "os^"[number // len(PALETTE)]
        axes.plot(
            steps, row["curve"], line, marker=marker, markersize=4, linewidth=1.2, color=PALETTE[number % len(PALETTE)],
            label=row["method"],
        )  # fmt: skip
    axes.set(xlabel="tasks learnt (broken lines: no text is kept)", ylabel="average score on them, %")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / PICTURE)


def _measured(report: Row) -> str:
    return (
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}. "
        f"Data: {report['data']}."
    )


def _gib(size: float) -> str:
    """Of a GPU; nothing where there was none."""
    return f"{size / 2**30:.1f}" if size else ""


def _range(row: Row, what: str) -> str:
    low, high = row[f"{what}_range"]
    return f"{row[what]:.2f} [{low:.2f}, {high:.2f}]"
