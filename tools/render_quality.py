"""The sections of docs/results.md about routing by token, from docs/results/quality.json and adding.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.pictures import PALETTE, pyplot, save
from tools.render_kernels import bars

Row = dict[str, Any]
PICTURES = ("quality.svg", "domains.svg", "routers.svg")
EDGE = 130  # percent, at which the bars end


def section(report: Row, adding: Row | None, again: Sequence[Row] = ()) -> list[str]:
    """Lines of Markdown. again: reports of trainings from nothing with other seeds, the first with seed 1."""
    sets = list(report["rows"][0]["sets"])
    parts = [
        "## Does routing by token pay?",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. Share of the way from the base to the label oracle that a "
        "contender closes, by the loss of answer tokens; brackets hold 95% bootstrap intervals over sequences. "
        "*Domains alone*: the mean over domains of the share on text of one domain. *Short answers*: share of those of "
        f"up to 24 tokens ({sets[0]}) that greedy decoding gets word for word.",
        "",
        f"![Share of the gap closed](images/{PICTURES[0]})",
        "",
        f"| contender | {' | '.join(sets)} | domains alone | short answers |",
        "|---|" + "---|" * (len(sets) + 2),
    ]
    parts += [_line(row, report) for row in report["rows"]]
    if report["missing"]:
        parts += ["", f"Not measured: {', '.join(report['missing'])}."]
    parts += ["", "### What had to be reached", "", *bars(report["must"])]
    if again or report.get("integrated"):
        parts += ["", *_seeds(report, again)]
    parts += ["", "### By domain", "", f"![Loss by domain](images/{PICTURES[1]})", "", *_by_domain(report)]
    parts += ["", "### Variants of the router", "", f"![Variants of the router](images/{PICTURES[2]})", ""]
    parts += ["Share of tokens that go to their own domain, by position in a question or an answer (turns):", ""]
    parts += positions(report["rows"], "right")
    if adding:
        parts += ["", *_adding(adding)]
    return [*parts, ""]


def draw(report: Row, folder: Path) -> None:
    """The pictures of :func:`section`."""
    sets = list(report["rows"][0]["sets"])
    kinds = (
        "oracle",
        "integrated",
        "multitask",
        "full",
        "merge",
        "peft router",
        "by sequence",
        "by turn",
        "sequence-oracle",
        "prompt",
    )
    first = _first(report)
    shown = [row for row in report["rows"] if row["kind"] in kinds or row is first]
    _bars(shown, sets, folder / PICTURES[0])
    routers = [row for row in report["rows"] if row["kind"] == "router"]
    _bars(routers, sets, folder / PICTURES[2])
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9.5, 3.2))
    domains = list(report["rows"][0]["single"])
    own = {name: _own(report, name) for name in domains}
    columns = {
        "base": report["rows"][0]["single"],
        "its own adapter": {name: own[name] for name in domains},
        "router": first["single"],
    }
    for number, (label, values) in enumerate(columns.items()):
        places = [index + 0.27 * (number - 1) for index in range(len(domains))]
        axes.bar(places, [values[name] for name in domains], 0.25, label=label, color=PALETTE[(6, 1, 0)[number]])
    axes.set_xticks(range(len(domains)), domains)
    axes.set(ylabel="nats an answer token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / PICTURES[1])


def _bars(rows: Sequence[Row], sets: Sequence[str], file: Path) -> None:
    plt = pyplot()
    rows = sorted(rows, key=lambda row: row["sets"][sets[0]]["gap_closed"])
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    height = 0.8 / len(sets)
    for number, name in enumerate(sets):
        places = [index + 0.4 - height * (number + 0.5) for index in range(len(rows))]
        values = [100 * row["sets"][name]["gap_closed"] for row in rows]
        axes.barh(places, values, height, label=name, color=PALETTE[number])
    for index, row in enumerate(rows):  # a bar that goes on says how far
        beyond = [(number, row["sets"][name]["gap_closed"]) for number, name in enumerate(sets)]
        beyond = [(number, 100 * value) for number, value in beyond if 100 * value > EDGE]
        if beyond:
            place = index + 0.4 - height * (sum(number for number, _ in beyond) / len(beyond) + 0.5)
            said = ", ".join(f"{value:.0f}" for _, value in beyond)
            axes.text(EDGE + 1, place, said, fontsize=6, va="center", ha="left")
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="% of the gap from base to label oracle", xlim=(0, EDGE))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # above, where no bar is
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def _line(row: Row, report: Row) -> str:
    sets = list(report["rows"][0]["sets"])
    cells = [_closed(row["sets"][name]) if name in row["sets"] else "" for name in sets]
    alone = _alone(row, report)
    shown = "" if alone is None else f"{alone:.1%}"
    accuracy = f"{row['sets'][sets[0]]['accuracy']:.1%}"
    return f"| {_name(row, report)} | {' | '.join(cells)} | {shown} | {accuracy} |"


def _first(report: Row) -> Row:
    """The router that the lines are about."""
    found: Row = next(row for row in report["rows"] if row["kind"] == "router")
    return found


def _name(row: Row, report: Row) -> str:
    return f"**{row['contender']}**" if row is _first(report) else str(row["contender"])


def _closed(of: Row) -> str:
    low, high = of["gap_closed_interval"]
    return f"{of['gap_closed']:.1%}" if low == high else f"{of['gap_closed']:.1%} [{low:.1%}, {high:.1%}]"


def _own(report: Row, domain: str) -> float:
    rows = {row["contender"]: row for row in report["rows"]}
    return float(rows[f"{domain} alone"]["single"][domain])


def _alone(row: Row, report: Row) -> float | None:
    base = report["rows"][0]["single"]
    if not row["single"]:
        return None
    shares = [(base[name] - row["single"][name]) / (base[name] - _own(report, name)) for name in base]
    return sum(shares) / len(shares)


def _by_domain(report: Row) -> list[str]:
    base, router = report["rows"][0], _first(report)
    lines = ["| domain | base | its own adapter | router | router above its own |", "|---|---|---|---|---|"]
    for name in base["single"]:
        own, mine = _own(report, name), router["single"][name]
        lines.append(f"| {name} | {base['single'][name]:.3f} | {own:.3f} | {mine:.3f} | {mine - own:+.4f} |")
    return lines


def positions(rows: Sequence[Row], key: str) -> list[str]:
    """The table of right tokens by position, for the routers that have it under ``key`` and run one adapter a token."""
    rows = [row for row in rows if row[key] and "top-2" not in row["contender"]]
    names = list(rows[0][key])
    lines = [f"| router | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        values = " | ".join(f"{row[key][name]:.1%}" for name in names)
        lines.append(f"| {row['contender']} | {values} |")
    return lines


def _seeds(report: Row, again: Sequence[Row]) -> list[str]:
    """The lines that had to be reached, in all trainings and with the integration adapter."""
    columns = {f"seed {number}": one["must"] for number, one in enumerate((report, *again))}
    if report.get("integrated"):
        columns["seed 0, integrated"] = report["integrated"]
    every = [{line["name"]: line for line in lines} for lines in columns.values()]
    names = [line["name"] for line in report["must"] if all(line["name"] in one for one in every)]
    commits = ", ".join(f"`{one['command']}` (commit {one['commit']})" for one in again)
    lines = [
        "### Trained from nothing with other seeds, and with an integration adapter",
        "",
        f"{commits}: other adapters, another router, other text to learn from; the same test text, less of it. "
        "*Integrated*: one more adapter beside whatever the router chooses, trained on mixed text on top of it. The "
        "values of the lines above, those that are reached in bold.",
        "",
        f"| | bar | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(every),
    ]
    for name in names:
        found = [one[name] for one in every]
        values = [f"**{line['value']:.3f}**" if line["holds"] else f"{line['value']:.3f}" for line in found]
        sign = "≥" if found[0]["better"] == "higher" else "≤"
        lines.append(f"| {name} | {sign} {found[0]['bar']} | {' | '.join(values)} |")
    return lines


def _adding(report: Row) -> list[str]:
    new = report["new"]
    old = [name for name in report["rows"][0]["right"] if name not in new]
    lines = [
        "### Adapters that come later",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}. The "
        f"router was trained without {' and '.join(new)}; their rows are then computed from examples, and the router "
        "trained on for a little where that is said. Share of tokens that go to their own domain, and nats an answer "
        "token.",
        "",
        f"| router | {' | '.join(f'{name}, right' for name in new)} | old domains, right | all mixed, right | "
        "loss, old domains mixed | loss, all mixed |",
        "|---|" + "---|" * (len(new) + 4),
    ]
    for row in report["rows"]:
        right = " | ".join(f"{row['right'][name]:.1%}" for name in new)
        others = sum(row["right"][name] for name in old) / len(old)
        lines.append(
            f"| {row['contender']} | {right} | {others:.1%} | {row['mixed_right']['all']:.1%} | "
            f"{row['mixed']['old']:.4f} | {row['mixed']['all']:.4f} |"
        )
    return [*lines, "", *bars(report["must"])]
