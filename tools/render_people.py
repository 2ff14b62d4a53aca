"""The sections of docs/results.md about what an adapter of one's own brings: people-raters, people-presidents.json."""

from typing import Any

from tools.render_kernels import bars, table
from tools.render_serving import about

Row = dict[str, Any]
METRICS = {"accuracy": "right", "mae": "away from right", "rouge_1": "ROUGE-1", "rouge_l": "ROUGE-L"}


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    rows, cost = report["rows"], report["cost"]
    metrics = [name for name in METRICS if name in rows[0]]
    kind = "raters of films" if "accuracy" in metrics else "presidents"
    lines = [
        [
            row["contender"],
            _with_interval(row, "loss"),
            *(_with_interval(row, name) for name in metrics),
            f"{report['unrelated'][row['contender']]:.3f}" if row["contender"] in report["unrelated"] else "",
        ]
        for row in rows
    ]
    costs = [
        [
            way,
            f"{one['seconds']:.3f}",
            f"{one['adapter_bytes'] / 1e6:.1f}",
            f"{one['kept_bytes']:,.0f}" if "kept_bytes" in one else "",
        ]
        for way, one in cost.items()
    ]
    return [
        f"## What does an adapter of one's own bring? {report['people']} {kind}",
        "",
        f"{about(report)} Nothing was trained on any of them; their histories tell, or are learnt. *Nats* of an "
        "answer's token; brackets hold 95% bootstrap intervals over people. *Another's*: everybody under the next "
        "one's adapter. *Unrelated*: nats of an answer's token about science.",
        "",
        *table(["", "nats", *(METRICS[name] for name in metrics), "unrelated"], lines),
        "",
        *table(["to make one", "s a person", "MB of the adapter", "bytes kept of a person"], costs),
        "",
        *bars(report["must"]),
        "",
    ]


def _with_interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"
