"""Related adapters as people have them: many of rank 16, each trained on its own part of a domain's conversations.

    molora train data math code medicine law science reading commonsense puzzles
    python -m benchmarks.splits splits --count 100
    python -m benchmarks.compress --trained splits --basis 32 64 128

For each domain an adapter learns from half of the training conversations; the others go on from it, each with a part of
the other half that no other has. What is trained already is not trained again. Several processes share the domains:
--share 0/4 to 3/4.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from molora_training import adapter
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.data import data_dir

DOMAINS = ("math", "code", "medicine", "law", "science", "reading", "commonsense", "puzzles")
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the adapters go, and their parts of the data")
    parser.add_argument("--count", type=int, default=100, help="adapters")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="of N processes that share the domains, the I-th")
    given = parser.parse_args()
    own, processes = map(int, given.share.split("/"))
    for place, domain in list(enumerate(DOMAINS[: given.count]))[own::processes]:
        numbers = range(place, given.count, len(DOMAINS))
        rows = (data_dir() / f"{domain}.train.jsonl").read_text(encoding="utf-8").splitlines()
        start = given.folder / "starts" / domain
        train(start, domain, rows[::2], epochs=2, learning_rate=2e-3, lora=LoraShape(RANK, 2.0 * RANK))
        for turn, number in enumerate(numbers):
            part = rows[1::2][turn :: len(numbers)]
            train(given.folder / f"{domain}-{number}", domain, part, epochs=3, learning_rate=1e-3, start=start)


def train(out: Path, domain: str, rows: list[str], **settings: Any) -> None:
    """Trains ``out`` on ``rows`` (JSON Lines), if it is not there yet."""
    if (out / "metrics.json").is_file():
        return
    text = out.with_name(f".{out.name}.train.jsonl")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    data = DataFiles(text, data_dir() / f"{domain}.validation.jsonl")
    training = AdapterTrainSettings(out, data, checkpoint_every=1000, **settings)
    metrics = adapter.train(training)
    shutil.rmtree(training.work)  # a hundred checkpoints are six gigabytes
    print(json.dumps({"adapter": out.name, "conversations": len(rows), **metrics}), flush=True)


if __name__ == "__main__":
    main()
