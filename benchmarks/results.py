"""Puts what the GPU benchmarks wrote together as docs/results/kernels.json, with the bars that had to be reached.

python -m benchmarks.results runs/gpu
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from molora.provenance import commit

ADDED = {8: {1: 0.40, 8: 0.50, 64: 0.65}, 64: {1: 0.75, 8: 0.9, 64: 1.3}, 1024: {1: 0.75, 8: 0.9, 64: 1.3}}
WHOLE = {1: 3.0, 8: 4.0, 64: 11.0}
OVER = {8: 0.11, 64: 0.17}
ROUTE = {1: 12.0, 64: 20.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where step.json and prefill.json are")
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernels.json"))
    settings = parser.parse_args()
    step, prefill = (json.loads((settings.folder / f"{name}.json").read_text()) for name in ("step", "prefill"))
    if step["device"] != prefill["device"]:
        parser.error(f"{step['device']} and {prefill['device']}: measure both in one run.")
    report = {
        "command": "benchmarks/gpu.sh",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": step["device"],
        "seed": step["seed"],
        "data": "random weights, adapters and tokens; Qwen3 shapes; bf16; 512 tokens of context in a decode step",
        "rows": [{"what": "decode", **row} for row in step["rows"]]
        + [{"what": "prefill", **row} for row in prefill["rows"]],
        "must": decode_bars(step["rows"]) + prefill_bars(prefill["rows"]),
    }
    settings.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in report["must"]:
        print(f"{line['name']}: {line['value']:.3f} (bar {line['bar']}) {'' if line['holds'] else 'MISSED'}")


def decode_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    routed = {(r["adapters"], r["batch"], r["top"]): r for r in rows if "adapters" in r and r["rank"] == 16}
    for (count, batch, top), row in routed.items():
        if top == 1 and count in ADDED:
            found.append(bar(f"decode step, added by {count} adapters, batch {batch}, ms", row["added_ms"],
                             ADDED[count][batch]))  # fmt: skip
        if top == 1 and count == 8:
            found.append(bar(f"whole routed step, batch {batch}, ms", row["routed_ms"], WHOLE[batch]))
        if top == 1 and count == 8 and batch in ROUTE:
            found.append(bar(f"router, memory and plan, batch {batch}, us", row["route_us"], ROUTE[batch]))
        one = routed.get((count, batch, 1))
        if top == 2 and one is not None:
            found.append(bar(f"top-2 against top-1, decode, {count} adapters, batch {batch}",
                             row["added_ms"] / one["added_ms"], 1.25))  # fmt: skip
    return found


def prefill_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    rows = [row for row in rows if row["tokens"] == 2048 and row["rank"] == 16]
    known = {(row["adapters"], row["top"], row["popularity"]): row for row in rows}
    for (count, top, popularity), row in known.items():
        one = known.get((count, 1, popularity))
        if (top, popularity) == (1, "uniform") and count in OVER:
            found.append(bar(f"prefill of 2,048, over base, {count} adapters", row["over"], OVER[count]))
        if (count, top, popularity) == (1024, 1, "uniform"):
            found.append(bar("prefill of 2,048 over 1,024 adapters, of its own limit",
                             row["added_ms"] / row["limit_ms"], 1.6))  # fmt: skip
        if top == 2 and popularity == "uniform" and one is not None:
            found.append(bar(f"top-2 against top-1, prefill, {count} adapters",
                             row["added_ms"] / one["added_ms"], 1.25))  # fmt: skip
    by_count = [row["added_ms"] for (count, top, kind), row in known.items()
                if top == 1 and kind == "uniform" and 2 <= count <= 64]  # fmt: skip
    if len(by_count) > 1:
        found.append(bar("added time against K from 2 to 64, 2,048 tokens", max(by_count) / min(by_count), 1.4))
    skew = [row["added_ms"] for (count, top, _), row in known.items() if (count, top) == (8, 1)]
    if len(skew) > 1:
        found.append(bar("skew: identical, Zipf, uniform; 8 adapters", max(skew) / min(skew), 1.25))
    return found


def bar(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": limit, "better": "lower", "holds": value <= limit, "note": ""}


if __name__ == "__main__":
    main()
