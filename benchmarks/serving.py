"""Many users' adapters in one model, beside one adapter for all: S-LoRA's question (arXiv 2311.03285), at its size.

    python -m benchmarks.serving --live 2000 --users 100000

Three traces on a base of random weights, each beside the same trace with one adapter for all users: as many users as
adapters are live; many more users, by Zipf's law, all at once; and these at a rate that the model keeps up with, whose
waiting times count. The adapters of those who ask most are there before. They are random, of q, k, v and o as S-LoRA's.
"""

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import add_device, check_device, compute_dtype, random_base
from molora import MoLoRAModel, Stack, StackLayer
from molora.serve.measure import measure_serve
from molora.serve.traffic import Traffic
from molora_training.report import heading, line, write_report

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = 0.6  # of the pace with one adapter, at which waiting times are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--live", type=int, default=2000, help="adapters in the model at once")
    parser.add_argument("--users", type=int, default=100_000, help="of the traces with more users than that")
    parser.add_argument("--zipf", type=float, default=1.0, help="how much more the first users ask")
    parser.add_argument("--requests", type=int, default=2000, help="of each trace")
    parser.add_argument("--rows", type=int, default=64, help="sequences at once")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 512), help="fewest and most tokens")
    parser.add_argument("--answer", type=int, nargs=2, default=(8, 512), help="fewest and most tokens")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    device = check_device(given)
    stack = Stack([StackLayer("user", {}, shared=True)])
    model = MoLoRAModel.from_base(random_base(given.shape, device, compute_dtype(device)), stack).eval()
    rows: list[dict[str, Any]] = []

    def measured(kind: str, users: int, rate: float, zipf: float) -> dict[str, Any]:
        traffic = Traffic(given.requests, rate, 1.0, users, zipf, tuple(given.prompt), tuple(given.answer))
        found = measure_serve(
            model, traffic, rows=given.rows, live=given.live, rank=given.rank, modules=MODULES, there=given.live
        )
        rows.append({"trace": kind, "rate": rate if math.isfinite(rate) else None, "ratio": found["ratio"]})
        rows[-1]["kinds"] = found["rows"]
        print(json.dumps(rows[-1]), flush=True)
        if given.out:  # after each, for a trace takes minutes
            about = heading(
                "python -m benchmarks.serving " + " ".join(sys.argv[1:]),
                f"random weights in the shape {given.shape}; prompts of {given.prompt[0]} to {given.prompt[1]} tokens, "
                f"answers of {given.answer[0]} to {given.answer[1]}; {given.requests} requests a trace",
            )
            write_report({**about, "rows": rows, "must": must(rows, given.live, given.users)}, given.out)
        return rows[-1]

    measured("all live", given.live, math.inf, 0.0)
    many = measured("many users", given.users, math.inf, given.zipf)
    pace = many["kinds"][0]["requests a second"]
    measured("many users, steadily", given.users, LATENT * pace, given.zipf)
    for entry in must(rows, given.live, given.users):
        print(f"{'reached' if entry['holds'] else 'missed '}  {entry['name']}: {entry['value']:.3f} ({entry['bar']})")


def must(rows: list[dict[str, Any]], live: int, users: int) -> list[dict[str, Any]]:
    """The lines that are to be reached, of the traces that are over."""
    lines = [
        line(f"pace with {live} live adapters, of that with one", rows[0]["ratio"], 0.9, "higher"),
        *(
            line(f"pace with {users} users, of that with one adapter", one["ratio"], 0.85, "higher")
            for one in rows[1:2]
        ),
    ]
    for steady in rows[2:3]:
        one, own = (kind["seconds to the first token"]["p99"] for kind in steady["kinds"])
        lines.append(line("first token later than with one adapter, p99, ms", 1e3 * (own - one), 30.0, "lower"))
    return lines


if __name__ == "__main__":
    main()
