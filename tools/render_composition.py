"""The sections of docs/results.md about merged and compressed adapters: merges, compress, compress-unrelated and
compressed-pace.json."""

from typing import Any

from tools.render_kernels import bars, table
from tools.render_serving import about

Row = dict[str, Any]


def merges(report: Row) -> list[str]:
    """Ways to make one adapter of several; lines of Markdown."""
    counts = sorted({row["adapters"] for row in report["rows"]})
    ways = list(dict.fromkeys(row["way"] for row in report["rows"]))
    rows = {(row["way"], row["adapters"]): row for row in report["rows"]}
    told = any(row.get("short_answers") is not None for row in report["rows"])
    heads = ["way", *(f"{count} adapters, kept" for count in counts), *["short answers"] * told, "error", "s", "MB"]
    lines = []
    for way in ways:
        most = rows[way, counts[-1]]
        error = most.get("error")
        lines.append(
            [
                way,
                *(_kept(rows[way, count]) for count in counts),
                *([_right(most)] if told else []),
                "" if error is None else f"{error:.2f}",
                f"{most['seconds']:.1f}" if "seconds" in most else "",
                f"{most['bytes'] / 1e6:.0f}" if "bytes" in most else "",
            ]
        )
    return [
        "## One adapter made of several",
        "",
        f"`{report['command']}` on one {report['machine']}, commit {report['commit']}, {report['date']}, seed "
        f"{report['seed']}. Data: {report['data']}, of {', '.join(report['names'])} the first so many. *Kept*: the "
        "share of what an adapter gains over the base on its own text, the mean over the adapters; brackets hold 95% "
        "bootstrap intervals. *Error*: norm of the difference to the exact sum, as a share of it. Error, seconds and "
        f"megabytes are of {counts[-1]} adapters; a soup's seconds are its training's."
        + f" *Short answers*: of {counts[-1]}, the share that greedy decoding gets word for word."
        * told,
        "",
        *table(heads, lines),
        "",
        *bars(report["must"]),
        "",
    ]


def compress(report: Row) -> list[str]:
    """A thousand compressed adapters; lines of Markdown."""
    return [
        "## A thousand adapters in little room",
        "",
        f"{about(report)} Each adapter is one of the starter's domain adapters with noise of the whole rank beside "
        "it, as if trained again on other data. *Error*: norm of what is lost, a share of the adapter's, which is the "
        "noise; *gain kept*: of the first adapter of each domain, on its own test conversations.",
        "",
        *_directions(report),
        "",
        *bars(report["must"]),
        "",
    ]


def unrelated(report: Row) -> list[str]:
    """Adapters that have nothing in common; lines of Markdown."""
    return [
        "### Adapters that have nothing in common",
        "",
        f"{about(report)} As above for one adapter of each domain; the others are noise alone, as large. All are "
        "forced into the bases here: `molora compress` keeps such adapters as they came (`--most-error`).",
        "",
        *_directions(report),
        "",
    ]


def pace(report: Row) -> list[str]:
    """Tokens a second from the compressed form; lines of Markdown."""
    kinds = list(dict.fromkeys(row["kind"] for row in report["rows"]))
    batches = list(dict.fromkeys(row["batch"] for row in report["rows"]))
    rows = {(row["kind"], row["batch"]): row for row in report["rows"]}
    lines = [
        [
            kind,
            *(f"{rows[kind, batch]['tokens a second']:,.0f}" for batch in batches),
            f"{rows[kind, batches[0]]['bytes of adapters'] / 1e6:,.0f}",
        ]
        for kind in kinds
    ]
    return [
        "### How fast they are served",
        "",
        f"{about(report)} Tokens a second of `generate` over SmolLM2-135M in bfloat16, every sequence with another "
        "adapter; random ones on all linear modules. Megabytes without the bases that compressed ones share.",
        "",
        *table(["", *(f"batch {batch}" for batch in batches), "MB of adapters"], lines),
        "",
        *bars(report["must"]),
        "",
    ]


def _directions(report: Row) -> list[str]:
    lines = [
        [
            row["basis"],
            f"{row['share of the bytes']:.1%}",
            f"{row['error, median']:.3f}, {row['error, worst']:.3f}",
            f"{row['gain kept, mean']:.1%}",
            f"{row['gain kept, least']:.1%}",
            f"{row['seconds']:,.0f}",
        ]
        for row in report["rows"]
    ]
    return table(["directions", "of the bytes", "error, median, worst", "gain kept, mean", "least", "seconds"], lines)


def _right(row: Row) -> str:
    right = row.get("short_answers")
    return "" if right is None else f"{right:.1%}"


def _kept(row: Row) -> str:
    low, high = row["gain_kept_interval"]
    return f"{row['gain_kept']:.1%}" if low == high else f"{row['gain_kept']:.1%} [{low:.1%}, {high:.1%}]"
