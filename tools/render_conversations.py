"""The section of docs/results.md about what an adapter knows of past conversations: conversations.json."""

from typing import Any

from tools.render_kernels import bars, table
from tools.render_serving import about

Row = dict[str, Any]


def section(report: Row) -> list[str]:
    """Lines of Markdown."""
    lines = []
    for row in report["rows"]:
        low, high = row["accuracy_interval"]
        unseen = row["negatives_unseen"]
        lines.append(
            [
                row["contender"],
                f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
                f"{row['positives']:.1%}",
                f"{row['negatives']:.1%}",
                "" if unseen is None else f"{unseen:.1%}",
                f"{row['open_positives']:.3f}",
                f"{row['open_negatives']:.1%}",
            ]
        )
    heads = ["", "closed: right", "of discussed", "of not discussed", "of these of other conversations"]
    heads += ["open: ROUGE-L", "told not discussed"]
    return [
        "## What does it know of past conversations?",
        "",
        f"{about(report)} Conversations are learnt one after the other, {report['seconds']:.1f} s each (the median); "
        "no text of them stays. *Closed*: whether something was discussed, yes and no as often, in wordings that were "
        "not learnt; brackets hold 95% bootstrap intervals over conversations. Of what was not discussed half are "
        "topics of a list, from a part that is for tests alone, half topics of other conversations. *Open*: what was "
        f"said. A search by words{' and meaning' if report.get('encoder') else ''} puts three exchanges into the "
        "prompt.",
        "",
        *table(heads, lines),
        "",
        *bars(report["must"]),
        "",
    ]
