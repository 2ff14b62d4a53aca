"""The section of docs/results.md about a small model with a stack against a larger one, from headline.json."""

from typing import Any

from tools.render_kernels import bars

Row = dict[str, Any]


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    names = list(report["parameters"])
    sizes = ", ".join(f"{name} {report['parameters'][name] / 1e6:.0f} million" for name in names[:3])
    parts = [
        "## Is a small model with a stack better than a larger one without?",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}. Zero-shot accuracy through lm-evaluation-harness, options compared "
        f"by the likelihood of their text. Parameters without adapters: {sizes}. The difference is that to the better "
        "way of asking the larger model, on the same questions; brackets hold its 95% bootstrap interval.",
        "",
        f"| benchmark | questions | {' | '.join(names)} | difference |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for row in report["rows"]:
        accuracies = " | ".join(f"{row['accuracy'][name]:.1%}" for name in names)
        low, high = row["difference_interval"]
        lead = f"{row['difference']:+.1%} [{low:+.1%}, {high:+.1%}]"
        parts.append(f"| {row['benchmark']} | {row['questions']:,} | {accuracies} | {lead} |")
    return [*parts, "", *bars(report["must"]), ""]
