"""The section of docs/results.md about what a router remembers, from router-memory.json."""

from typing import Any

Row = dict[str, Any]


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    sets = list(report["rows"][0]["right"])
    parts = [
        "## What should a router remember?",
        "",
        f"`{report['command']}` on {report['machine']}, commit {report['commit']}, {report['date']}, seeds "
        f"{', '.join(map(str, report['seeds']))}. Data: {report['data']}. Routers that read embeddings alone, 128 "
        "features of them and 512 hidden units; share of answer tokens that go to their own domain, of nine, by seed. "
        "*Validation* is the mean over the three kinds of text and the seeds, by which a memory is to be chosen.",
        "",
        f"| memory | validation | {' | '.join(sets)} | parameters | numbers kept a sequence |",
        "|---|" + "---|" * (len(sets) + 3),
    ]
    for name in dict.fromkeys(row["memory"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["memory"] == name]
        cells = [", ".join(f"{row['right'][of]:.1%}" for row in rows) for of in sets]
        chosen = [share for row in rows for share in row["validation"].values()]
        cells.insert(0, f"{sum(chosen) / len(chosen):.1%}")
        parts.append(f"| {name} | {' | '.join(cells)} | {rows[0]['parameters']:,} | {rows[0]['state']:,} |")
    return [*parts, ""]
