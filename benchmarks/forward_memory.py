"""Memory of a federated client that learns by backpropagation, and of one that learns by forward passes alone.

    molora train data science
    python -m benchmarks.forward_memory --batch-tokens 2048

Each way has a process of its own, on the CPU, and learns one step of the same conversations. Told are what is resident
before it (libraries and base), the peak during it, and the share of backpropagation's peak that is needed: of all, and
of what the step itself adds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

WAYS = ("backprop", "forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="science", help="prepared data")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="padded tokens of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a conversation at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one(given)))
        return
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.forward_memory", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    backprop, forward = (found[way] for way in WAYS)
    of_all = forward["peak"] / backprop["peak"]
    added = (forward["peak"] - forward["before"]) / (backprop["peak"] - backprop["before"])
    report = {"settings": {"batch_tokens": given.batch_tokens, "rank": given.rank, "data": given.data},
              "bytes": found, "of all": round(of_all, 3), "of what a step adds": round(added, 3)}  # fmt: skip
    for way, row in found.items():
        print(f"{way:9} {row['before'] / 1e6:7.0f} MB before, {row['peak'] / 1e6:7.0f} MB at most")
    print(f"forward passes need {of_all:.1%} of backpropagation's memory, {added:.1%} of what its step adds")
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def one(given: argparse.Namespace) -> dict[str, int]:
    """Bytes that are resident before and at most, of one way."""
    from molora.base import DEFAULT_BASE
    from molora_training.attention import attend_causally
    from molora_training.batches import rounded
    from molora_training.continual.growth import blank
    from molora_training.data import data_dir, encode_within, read_examples
    from molora_training.federated import forward_only, local
    from molora_training.federated.client import Base
    from molora_training.federated.lora import Lora
    from molora_training.federated.settings import LocalSettings
    from molora_training.federated.usage import measured, peak_bytes

    base = Base.load(DEFAULT_BASE)
    examples = read_examples(data_dir() / f"{given.data}.train.jsonl")
    rows = encode_within(examples, base.tokenizer, given.max_length, [given.data])
    count, tokens = 0, 0
    while count < len(rows) and tokens + given.max_length <= given.batch_tokens:
        tokens += rows[count].input_ids.numel()
        count += 1
    how = LocalSettings(method=given.way, batch_tokens=given.batch_tokens, max_length=given.max_length, examples=count)
    with tempfile.TemporaryDirectory() as scratch:
        blank(DEFAULT_BASE, given.rank, Path(scratch) / "blank")
        lora = Lora.from_folder(Path(scratch) / "blank")
    attend_causally(base.model, rounded(given.max_length))
    with measured():
        before = peak_bytes()
    forward_only.MOST = forward_only.FEWEST  # directions come one after the other: more take time, and no more memory
    with measured() as usage:
        way = forward_only.train if given.way == "forward" else local.train
        way(base.model, base.pad_id, lora, rows[:count], how, 0)
    return {"before": before, "peak": usage.peak_bytes}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
