"""The sections of docs/results.md about serving: chats, serve and soak.json."""

from typing import Any

from tools.render_kernels import bars, table

Row = dict[str, Any]


def chats(report: Row) -> list[str]:
    """The engine beside ``generate``; lines of Markdown."""
    lines = [
        [name, f"{pace:.1f}", f"{min(report['runs'][name]):.1f} to {max(report['runs'][name]):.1f}"]
        for name, pace in report["tokens a second"].items()
    ]
    return [
        "## Serving",
        "",
        "### Chats at once, beside `generate` on one batch",
        "",
        f"{about(report)} Tokens a second, prompts included; the median of runs in turns. `generate` knows all "
        "prompts beforehand; the engine learns of each as it comes.",
        "",
        *table(["", "tokens/s", "runs"], lines),
        "",
        *bars(report["must"]),
        "",
    ]


def serve(report: Row) -> list[str]:
    """Many users' adapters; lines of Markdown."""
    traffic = report["traffic"]
    lines = []
    for row in report["rows"]:
        first, between, pool = row["seconds to the first token"], row["seconds between tokens"], row["pool"]
        lines.append(
            [
                row["kind"],
                f"{row['tokens a second']:.1f}",
                *(f"{one[at]:.2f} s" for one in (first, between) for at in ("p50", "p95", "p99")),
                pool["reads"],
                f"{pool['live_hits'] / (pool['live_hits'] + pool['host_hits']):.0%}",
            ]
        )
    firsts = [row["seconds to the first token"]["p50"] for row in report["rows"]]
    heads = ["first token, p50", "p95", "p99", "between tokens, p50", "p95", "p99"]
    return [
        "### An adapter for each user",
        "",
        f"{about(report)} {traffic['requests']} requests of {traffic['users']} users (Zipf {traffic['zipf']:g}), "
        f"{traffic['rate']:g} a second, {report['sequences at once']} sequences at once, adapters of rank "
        f"{report['rank']}, at most {report['rows'][0]['pool']['most']} of them live. *read*: adapters from disk; "
        "*live*: requests that found theirs in the model.",
        "",
        *table(["", "tokens/s", *heads, "read", "live"], lines),
        "",
        f"With their own adapters: {report['ratio']:.1%} of the pace with one for all, and half of the requests wait "
        f"for their first token for more than {firsts[1]:.1f} s instead of {firsts[0]:.1f} s.",
        "",
    ]


def soak(report: Row) -> list[str]:
    """A long load; lines of Markdown."""
    memory = report["memory"]["MiB"]
    return [
        "### Fifty thousand requests",
        "",
        f"{about(report)} A tiny model behind the whole server: {report['requests']:,} requests in "
        f"{report['seconds']:,.0f} s, {report['swaps']:,} adapters brought into the model, {report['right']:,} answers "
        f"compared with what the model says alone, {report['left']:,} clients that left before their answer had ended, "
        f"{report['refused']:,} that asked for who is not there. Memory of the process: {memory[0]} MiB in the "
        f"beginning, {memory[-1]} in the end.",
        "",
        *bars(report["must"]),
        "",
    ]


def about(report: Row) -> str:
    threads = f", {report['threads']} thread{'s' if report['threads'] > 1 else ''}" if "threads" in report else ""
    return (
        f"`{report['command']}` on one {report['machine']}{threads}, commit "
        f"{report['commit']}, {report['date']}, seed {report['seed']}. Data: {report['data']}."
    )
