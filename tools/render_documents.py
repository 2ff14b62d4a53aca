"""The sections of docs/results.md about adapters that a network makes of documents: documents-long.json is of one that
has learnt needles, documents-passages.json of one that has learnt passages too."""

from typing import Any

from tools.render_kernels import bars

Row = dict[str, Any]

# By what was learnt last: the heading, and what stands behind the network's size.
LEARNT = {
    "needle": (
        "What does an adapter that was made of a document know of it?",
        "has learnt to find a number in filler (stage 2 of `benchmarks/documents.sh`)",
    ),
    "passages": (
        "What does it know of a passage?",
        "has learnt passages, other texts and needles together (the last stage of `benchmarks/documents.sh`)",
    ),
}


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    cost, net = report["cost"], report["network"]
    less = cost[f"bytes at rank {net['rank']}"]
    title, learnt = LEARNT[report.get("task", "needle")]
    parts = [
        f"## {title}",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. The network, {report['parameters'] / 1e6:.1f} million "
        f"parameters, {learnt}, and reads chunks of "
        f"{net['chunk']} tokens. An adapter of {cost['tokens']:,.0f} tokens took {cost['seconds'] * 1000:.0f} ms and "
        f"{cost['bytes'] / 1e6:.1f} MB, cut to rank {net['rank']} {less / 1e6:.1f} MB.",
        "",
        f"| needle in a text of | rank | found | found, cut to rank {net['rank']} |",
        "|---|---|---|---|",
    ]
    for row in report["needles"]:
        found, less = row["recall"], row[f"recall at rank {net['rank']}"]
        parts.append(f"| {row['tokens']:,} tokens | {row['rank']} | {found:.1%} | {less:.1%} |")
    for kind in dict.fromkeys(row.get("kind") for row in report["rows"]):  # older reports have all kinds together
        parts += ["", f"| {_asked(kind)} | F1 | ROUGE-L |", "|---|---|---|"]
        for row in report["rows"]:
            if row.get("kind") == kind:
                parts.append(f"| {row['contender']} | {_share(row, 'f1')} | {_share(row, 'rouge_l')} |")
    return [*parts, "", *bars(report["must"]), ""]


def _asked(kind: str | None) -> str:
    if kind is None:
        return "questions about passages"
    if kind in ("words", "yes or no"):
        return f"questions about passages, answered {'in' if kind == 'words' else 'by'} {kind}"
    return f"questions for {kind}"


def _share(row: Row, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} [{low:.1%}, {high:.1%}]"
