"""The section of docs/results.md about adapters that a network makes of documents: documents-passages.json."""

from typing import Any

from tools.render_kernels import bars

Row = dict[str, Any]


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    cost, net = report["cost"], report["network"]
    less = cost[f"bytes at rank {net['rank']}"]
    parts = [
        "## What does an adapter that was made of a document know of it?",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. The network, {report['parameters'] / 1e6:.1f} million "
        "parameters, has learnt passages, other texts, facts and numbers together (the last stage of "
        f"`benchmarks/documents.sh`), and reads chunks of {net['chunk']} tokens. An adapter of {cost['tokens']:,.0f} "
        f"tokens took {cost['seconds'] * 1000:.0f} ms and {cost['bytes'] / 1e6:.1f} MB, cut to rank {net['rank']} "
        f"{less / 1e6:.1f} MB.",
        "",
        f"| needle in a text of | rank | found | found, cut to rank {net['rank']} |",
        "|---|---|---|---|",
    ]
    for row in report["needles"]:
        found, less = row["recall"], row[f"recall at rank {net['rank']}"]
        parts.append(f"| {row['tokens']:,} tokens | {row['rank']} | {found:.1%} | {less:.1%} |")
    for kind in dict.fromkeys(row["kind"] for row in report["rows"]):
        parts += ["", f"| {_asked(kind)} | F1 | ROUGE-L |", "|---|---|---|"]
        for row in report["rows"]:
            if row["kind"] == kind:
                parts.append(f"| {row['contender']} | {_share(row, 'f1')} | {_share(row, 'rouge_l')} |")
    return [*parts, "", *bars(report["must"]), ""]


def _asked(kind: str) -> str:
    if kind in ("words", "yes or no"):
        return f"questions about passages, answered {'in' if kind == 'words' else 'by'} {kind}"
    return f"questions for {kind}"


def _share(row: Row, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} [{low:.1%}, {high:.1%}]"
