"""Puts what the GPU benchmarks wrote together as docs/results/kernels.json, with the bars that had to be reached.

python -m benchmarks.results runs/gpu

The folder holds what the benchmarks left there: step.json, prefill.json, train.json, peers.json, smollm.json and
kernels.csv (a layer's kernels). What is not there is left out, rows and bars; what is there must be of one GPU. With
--keep, what an earlier report has and the folder has not stays as it was, each row and bar with its commit.
"""

import argparse
import csv
import datetime
import json
import math
from pathlib import Path
from typing import Any

from molora.provenance import commit

ADDED = {8: {1: 0.40, 8: 0.50, 64: 0.65}, 64: {1: 0.75, 8: 0.9, 64: 1.3}, 1024: {1: 0.75, 8: 0.9, 64: 1.3}}
WHOLE = {1: 3.0, 8: 4.0, 64: 11.0}
OVER = {8: 0.11, 64: 0.17}
ROUTE = {1: 12.0, 64: 20.0}
ROUTE_PROMPT = 45.0
TOP_2 = 1.25
OWN_LIMIT = 1.6
BY_COUNT = 1.4
SKEW = 1.25
TRAIN = 1.35
XLORA = 100.0

FILES = {  # several of a kind, of other shapes and ranks, are put together
    "decode": "step*.json",
    "prefill": "prefill*.json",
    "train": "train.json",
    "peers": "peers.json",
    "smollm": "smollm.json",
    "layer": "kernels.csv",
}
SETTINGS = ("what", "shape", "adapters", "rank", "top", "popularity", "batch", "tokens", "sequences", "context")
WORDS = ("shape", "popularity", "device")  # columns of the CSV that hold no number

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the benchmarks wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernels.json"))
    parser.add_argument("--keep", type=Path, help="a report whose rows stay where none was measured again")
    settings = parser.parse_args()
    try:
        report = gather(settings.folder)
        if settings.keep is not None:
            report = keep(report, json.loads(settings.keep.read_text(encoding="utf-8")))
    except ValueError as error:
        parser.error(str(error))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for line in report["must"]:
        print(f"{line['name']}: {line['value']:.3f} (bar {line['bar']}) {'' if line['holds'] else 'MISSED'}")


def gather(folder: Path) -> dict[str, Any]:
    """The report of what ``folder`` holds.

    Raises:
        ValueError: it holds nothing, or figures of different machines.
    """
    found = {what: [read(file) for file in sorted(folder.glob(name))] for what, name in FILES.items()}
    devices = {part["device"] for parts in found.values() for part in parts}
    if not devices:
        raise ValueError(f"{folder} holds none of {', '.join(FILES.values())}: run benchmarks/gpu.sh.")
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(sorted(devices))}: measure all of them on one machine.")
    rows = {what: [row for part in parts for row in part["rows"]] for what, parts in found.items() if parts}
    rows = {what: once(own) for what, own in rows.items()}
    return {
        "command": "benchmarks/gpu.sh",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": devices.pop(),
        "seed": 0,
        "data": "random weights, adapters and tokens in Qwen3's shapes, bf16, 512 tokens of context in a decode step; "
        "smollm: the real SmolLM2-135M-Instruct with the starter stack, greedy",
        "rows": [{"what": what, **row} for what, part in rows.items() for row in part],
        "must": [
            *decode_bars(rows.get("decode", [])),
            *prefill_bars(rows.get("prefill", [])),
            *train_bars(rows.get("train", [])),
            *peer_bars(rows.get("peers", [])),
        ],
    }


def keep(report: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """``report`` and what only ``before`` has: rows of other settings, and bars of other lines.

    Raises:
        ValueError: the earlier report is of another machine.
    """
    if before["machine"] != report["machine"]:
        raise ValueError(f"{before['machine']} and {report['machine']}: measure all of them on one machine.")
    rows, must = {settings_of(row): row for row in report["rows"]}, {line["name"] for line in report["must"]}
    old = [{"commit": before["commit"], **row} for row in before["rows"]]
    # A row that was kept before and one that was measured then may have the same settings: the later one counts.
    kept = {settings_of(row): row for row in old if settings_of(row) not in rows}
    lines = [
        line if "commit " in line["note"] else {**line, "note": _noted(line["note"], f"commit {before['commit']}")}
        for line in before["must"]
        if line["name"] not in must
    ]
    ordered = sorted([*report["rows"], *kept.values()], key=lambda row: list(FILES).index(row["what"]))
    return {**report, "rows": ordered, "must": [*report["must"], *lines]}


def _noted(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def settings_of(row: Row) -> tuple[object, ...]:
    """What was measured, without what came out."""
    return tuple(row.get(name) for name in SETTINGS)


def once(rows: list[Row]) -> list[Row]:
    """Of the base's rows, which each run of a benchmark measures again, the first of each shape and size."""
    found: dict[object, Row] = {}
    for index, row in enumerate(rows):
        base = "base_ms" in row and "adapters" not in row
        found.setdefault((row["shape"], row.get("batch"), row.get("tokens")) if base else index, row)
    return list(found.values())


def read(file: Path) -> dict[str, Any]:
    """device and rows of one benchmark."""
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    with file.open(newline="", encoding="utf-8") as lines:
        rows: list[Row] = [
            {name: value if name in WORDS else _number(value) for name, value in row.items()}
            for row in csv.DictReader(lines)
        ]
    devices = {row.pop("device") for row in rows}
    return {"device": " and ".join(sorted(devices)), "rows": rows}


def _number(text: str) -> int | float | None:
    """None for what was not run."""
    if text.isdigit():
        return int(text)
    return None if text == "" or math.isnan(float(text)) else float(text)


def decode_bars(rows: list[Row]) -> list[Row]:
    """Of the 1.7B shape at rank 16."""
    found = []
    rows = [row for row in rows if "adapters" in row and (row["shape"], row["rank"]) == ("1.7B", 16)]
    routed = {(row["adapters"], row["batch"], row["top"]): row for row in rows}
    for (count, batch, top), row in routed.items():
        if top == 1 and batch in ADDED.get(count, ()):
            found.append(
                bar(f"decode step, added by {count} adapters, batch {batch}, ms", row["added_ms"], ADDED[count][batch])
            )
        if top == 1 and count == 8 and batch in WHOLE:
            found.append(bar(f"whole routed step, batch {batch}, ms", row["routed_ms"], WHOLE[batch]))
        if top == 1 and count == 8 and batch in ROUTE and "route_us" in row:
            found.append(bar(f"router, memory and plan, batch {batch}, us", row["route_us"], ROUTE[batch]))
        one = routed.get((count, batch, 1))
        if top == 2 and one is not None:
            ratio = row["added_ms"] / one["added_ms"]
            found.append(bar(f"top-2 against top-1, decode, {count} adapters, batch {batch}", ratio, TOP_2))
    return found


def prefill_bars(rows: list[Row]) -> list[Row]:
    """Of 2,048 tokens, the 1.7B shape at rank 16."""
    found = []
    rows = [row for row in rows if (row["shape"], row["tokens"], row.get("rank", 16)) == ("1.7B", 2048, 16)]
    known = {(row["adapters"], row["top"], row["popularity"]): row for row in rows if "adapters" in row}
    for (count, top, popularity), row in known.items():
        one = known.get((count, 1, popularity))
        if (top, popularity) == (1, "uniform") and count in OVER:
            what = f"prefill of 2,048, added over base, {count} adapters"
            found.append(bar(what, row["added_over"], OVER[count], note=other_bases(row)))
        if (count, top, popularity) == (1024, 1, "uniform"):
            ratio = row["added_ms"] / row["limit_ms"]
            found.append(bar("prefill of 2,048 over 1,024 adapters, of its own limit", ratio, OWN_LIMIT))
        if top == 2 and popularity == "uniform" and one is not None:
            ratio = row["added_ms"] / one["added_ms"]
            found.append(bar(f"top-2 against top-1, prefill, {count} adapters", ratio, TOP_2))
    by_count = {
        count: row["added_ms"]
        for (count, top, kind), row in known.items()
        if top == 1 and kind == "uniform" and 2 <= count <= 64
    }
    if len(by_count) > 1:
        what = f"added time against K from {min(by_count)} to {max(by_count)}, 2,048 tokens"
        found.append(bar(what, max(by_count.values()) / min(by_count.values()), BY_COUNT))
    skew = {kind: row["added_ms"] for (count, top, kind), row in known.items() if (count, top) == (8, 1)}
    if len(skew) > 1:
        what = f"skew, prefill: {', '.join(sorted(skew))}; 8 adapters"
        found.append(bar(what, max(skew.values()) / min(skew.values()), SKEW))
    routes = [row["route_us"] for row in rows if "route_us" in row]
    if routes:
        found.append(bar("router, memory and plan, prompt of 2,048, us", max(routes), ROUTE_PROMPT))
    return found


def other_bases(row: Row) -> str:
    """What is added is over the base of transformers, as the bar's limits are; our kernels' own base is faster."""
    return (
        f"{row['added_ms']:.2f} ms over the {row['base_ms']:.1f} of transformers; over the base by our own kernels "
        f"{row['added_ms'] / row['our_base_ms']:.1%}; the whole routed prompt takes {1 + row['over']:.0%} of "
        "transformers' base"
    )


def train_bars(rows: list[Row]) -> list[Row]:
    """Of 8 adapters of rank 16, 8 x 512 tokens, the 1.7B shape."""
    wanted = ("1.7B", 8, 16, 8, 512)
    names = ("shape", "adapters", "rank", "sequences", "tokens")
    return [
        bar("training step of the router over the base's forward and backward", row["ratio"], TRAIN)
        for row in rows
        if tuple(row[name] for name in names) == wanted
    ]


def peer_bars(rows: list[Row]) -> list[Row]:
    """Of 4 adapters of rank 16 after 512 tokens, the 1.7B shape."""
    found = []
    for row in rows:
        if (row["shape"], row["adapters"], row["rank"], row["context"]) == ("1.7B", 4, 16, 512):
            note = f"X-LoRA takes {row['xlora_ms']:.0f} ms; over a token of our generate: "
            note += f"{row['xlora_over_ours_generate']:.0f}"
            what = "X-LoRA's token over our step, 4 adapters, batch 1"
            found.append(bar(what, row["xlora_over_ours"], XLORA, "higher", note))
    return found


def bar(name: str, value: float, limit: float, better: str = "lower", note: str = "") -> Row:
    holds = value <= limit if better == "lower" else value >= limit
    return {"name": name, "value": value, "bar": limit, "better": better, "holds": holds, "note": note}


if __name__ == "__main__":
    main()
