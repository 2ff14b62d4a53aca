"""The section of docs/results.md about GPUs, from docs/results/kernels.json."""

from collections.abc import Sequence
from typing import Any

from benchmarks import plots

TITLES = {plots.DECODE: "Added to a decode step", plots.LAYER: "Added to a layer, ours beside others"}
PEERS = {
    "ours, captured step": "ours_step_ms",
    "ours, `generate`": "ours_generate_ms",
    "base, eager": "base_step_ms",
    "PEFT, one LoRA, eager": "peft_step_ms",
    "PEFT, one LoRA, `generate`": "peft_generate_ms",
    "PEFT X-LoRA, `generate`": "xlora_ms",
}

Row = dict[str, Any]


def section(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    parts = [
        "## On a GPU",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}.",
        "",
        *bars(report["must"]),
    ]
    pictures = plots.pictures(report["rows"])
    rows = [_marked(row) for row in report["rows"]]
    earlier = sorted({row["commit"] for row in rows if "commit" in row})
    if earlier:
        parts += ["", f"Rows with an asterisk are of an earlier commit ({', '.join(earlier)})."]
    for what, render in RENDERERS.items():
        own = [row for row in rows if row["what"] == what]
        if own:
            parts += ["", *render(own)]
        name = {"decode": plots.DECODE, "layer": plots.LAYER}.get(what)
        if name in pictures:
            parts += ["", f"![{TITLES[name]}](images/{name})"]
    return [*parts, ""]


def _marked(row: Row) -> Row:
    """An asterisk at the shape of what was measured at an earlier commit."""
    return {**row, "shape": f"{row['shape']}*"} if "commit" in row and "shape" in row else row


def _earlier(rows: Sequence[Row]) -> str:
    """For a title: the earlier commit at which the rows were measured."""
    return f", commit {rows[0]['commit']}" if "commit" in rows[0] else ""


def bars(must: Sequence[Row]) -> list[str]:
    """The table of what had to be reached."""
    lines = []
    for line in must:
        sign = "≥" if line["better"] == "higher" else "≤"
        note = f" ({line['note']})" if line["note"] else ""
        verdict = "reached" if line["holds"] else "**missed**"
        lines.append([f"{line['name']}{note}", f"{line['value']:.3f}", f"{sign} {line['bar']}", verdict])
    return table(["line", "value", "bar", ""], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    """Markdown; an empty first cell of ``head`` stays empty."""
    shown = [list(head), *([str(cell) for cell in line] for line in lines)]
    rows = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in shown]
    return [rows[0], "|" + "---|" * len(head), *rows[1:]]


def decode(rows: Sequence[Row]) -> list[str]:
    bare = [
        [row["shape"], row["batch"], *_numbers(row, "limit_ms", "base_ms", "compiled_base_ms")]
        for row in rows
        if "adapters" not in row
    ]
    routed = [
        [*(row[name] for name in ("shape", "adapters", "rank", "top", "batch")),
         *_numbers(row, "routed_ms", "added_ms"), *_numbers(row, "route_us", digits=1)]
        for row in rows if "adapters" in row
    ]  # fmt: skip
    lines = ["### A whole decode step, ms", ""]
    lines += table(["shape", "batch", "limit", "base, our step", "base, `torch.compile`"], bare)
    if routed:
        head = ["shape", "adapters", "rank", "top", "batch", "routed", "added", "router, memory and plan, µs"]
        lines += ["", *table(head, routed)]
    return lines


def prefill(rows: Sequence[Row]) -> list[str]:
    bare = [
        [row["shape"], row["tokens"], *_numbers(row, "base_ms", "our_base_ms"), *_numbers(row, "route_us", digits=1)]
        for row in rows
        if "adapters" not in row
    ]
    routed = [
        [*(row[name] for name in ("shape", "tokens", "adapters", "rank", "top", "popularity")),
         *_numbers(row, "ms", "added_ms", "modules_ms", "modules_added_ms", "limit_ms"), f"{row['over']:.1%}"]
        for row in rows if "adapters" in row
    ]  # fmt: skip
    lines = ["### A prompt, ms", ""]
    if bare:
        head = ["shape", "tokens", "base", "base, our kernels", "router, memory and plan, µs"]
        lines += [*table(head, bare), ""]
    head = ["shape", "tokens", "adapters", "rank", "top", "popularity", "routed", "added", "routed, by modules",
            "added, by modules", "limit of added", "over base"]  # fmt: skip
    return [*lines, *table(head, routed)]


def layer(rows: Sequence[Row]) -> list[str]:
    names = ["base", "limit", *plots.contenders(rows)]
    what = ["shape", "adapters", "rank", "tokens", "top", "popularity"]
    lines = [[*(row[name] for name in what), *_numbers(row, *names, digits=1)] for row in rows]
    return ["### One layer's kernels, µs over the base's products", "", *table([*what, *names], lines)]


def train(rows: Sequence[Row]) -> list[str]:
    lines = [
        [row["adapters"], f"{row['sequences']} x {row['tokens']}",
         *_numbers(row, "base_ms", "routed_ms", "ratio", "base_peak_gib", "routed_peak_gib")]
        for row in rows
    ]  # fmt: skip
    head = ["adapters", "tokens", "base, ms", "routed, ms", "ratio", "base's peak, GiB", "routed peak, GiB"]
    return [f"### A training step of the router, forward and backward{_earlier(rows)}", "", *table(head, lines)]


def peers(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        what = f"{row['adapters']} adapters, batch 1, {row['context']} tokens before it"
        times = [[name, *_numbers(row, key)] for name, key in PEERS.items()]
        lines += [f"### A token beside PEFT: {what}{_earlier(rows)}", "", *table(["", "ms"], times)]
    return lines


def smollm(rows: Sequence[Row]) -> list[str]:
    equal = f"{rows[0]['answers_equal']} of {rows[0]['answers']}"
    lines = [
        [row["batch"], *_numbers(row, "base_tokens_per_s", "routed_tokens_per_s", digits=0),
         *_numbers(row, "routed_over_base", digits=2)]
        for row in rows
    ]  # fmt: skip
    return [
        f"### SmolLM2-135M-Instruct with the starter stack, tokens/s in bf16{_earlier(rows)}",
        "",
        f"In float32 {equal} greedy answers are the CPU's, token for token, alone and in a batch.",
        "",
        *table(["batch", "base, `transformers`", "routed, captured", "of the base"], lines),
    ]


RENDERERS = {
    "decode": decode,
    "prefill": prefill,
    "layer": layer,
    "train": train,
    "peers": peers,
    "smollm": smollm,
}


def _numbers(row: Row, *names: str, digits: int = 3) -> list[str]:
    """Empty where nothing was measured."""
    return ["" if row.get(name) is None else f"{row[name]:.{digits}f}" for name in names]
