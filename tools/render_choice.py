"""The section of docs/results.md about the choice of a router on validation, from validation.json."""

from typing import Any

Row = dict[str, Any]


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    rows = {row["contender"]: row for row in report["rows"]}
    base, oracle = rows["base"], rows["label oracle"]
    routers = [row for row in report["rows"] if row["kind"] == "router"]
    sets, domains = list(base["sets"]), list(base["single"])
    parts = [
        "## Which router, by validation",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. Gap closed on mixed text; the mean share of the label oracle's "
        "gain that is kept on text of one domain; the domain that loses most, in nats above the oracle.",
        "",
        f"| router | {' | '.join(sets)} | one domain | loses most |",
        "|---|" + "---|" * (len(sets) + 2),
    ]
    for row in routers:
        closed = " | ".join(f"{row['sets'][name]['gap_closed']:.1%}" for name in sets)
        over = {name: row["single"][name] - oracle["single"][name] for name in domains}
        kept = [1 - over[name] / (base["single"][name] - oracle["single"][name]) for name in domains]
        most = max(over, key=lambda name: over[name])
        parts.append(f"| {row['contender']} | {closed} | {sum(kept) / len(kept):.1%} | {most}, {over[most]:.3f} |")
    return [*parts, ""]
