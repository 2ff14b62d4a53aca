"""What the table of people has to reach."""

from collections.abc import Mapping
from typing import Any

from molora_training.report import line

KEPT = 2048  # bytes of one whose adapter is put together


def must(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that the report's rows allow: those of ways that were not asked for are left out."""
    rows = {one["contender"]: one for one in report["rows"]}
    cost = report["cost"]
    metric = "accuracy" if "accuracy" in rows["base"] else "rouge_l"
    lines = []
    profile = "profile's adapter"
    if profile in rows:
        for other in ("base", f"{profile}, another's", f"{profile}, of a random direction"):
            between = rows[other]["loss_interval"][0] - rows[profile]["loss_interval"][1]
            lines.append(line(f"{profile}: nats between its interval and that of: {other}", between, 0.0, "higher"))
        if report["peak_bytes"] is not None:
            lines.append(line("seconds for an adapter from a profile", cost[profile]["seconds_of_one"], 0.05, "lower"))
            lines.append(line("seconds for 64 of them", cost[profile]["seconds_of_batch"], 0.5, "lower"))
    if "pieces" in rows:
        fitted = "pieces, weights fitted"
        share, of_gates = (rows[way][metric] / max(rows["own adapter"][metric], 1e-9) for way in (fitted, "pieces"))
        told = f"chosen and weighed by gates, as in the paper: {of_gates:.3f}"
        lines.append(line(f"{fitted}: {metric} as a share of the own adapter's", share, 0.99, "higher", told))
        lines.append(line(f"{fitted}: bytes kept of a person", cost[fitted]["kept_bytes"], KEPT, "lower"))
        search = [name for name in ("base", "task's adapter") if f"{name}, search in the prompt" in rows][-1]
        gain = rows["anchors and rank 4"][metric] - rows[f"{search}, search in the prompt"][metric]
        lines.append(line(f"anchors and rank 4: {metric} above {search} with a search", gain, 0.0, "higher"))
    return lines
