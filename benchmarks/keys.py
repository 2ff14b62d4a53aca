"""Does a question find its own adapter by keys, and does a question that is nobody's show?

    python -m benchmarks.keys math code medicine law science reading commonsense puzzles

Keys of the training questions of prepared data (`molora train data`), asked with the test split's. Then each set is
left out once: how likely one of its questions lies farther from every key than one of the others' (0.5: nothing shows).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from molora.base import DEFAULT_BASE, load_base
from molora.keys import SHRINKS, LayerKeys
from molora_training.continual.questions import MEAN, represented
from molora_training.data import Split, data_dir, encode_within, read_examples
from molora_training.report import heading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="two sets of prepared data or more")
    parser.add_argument("--data", type=Path, default=None, help="where it is (default: data in MoLoRA's cache)")
    parser.add_argument("--known", type=int, default=256, help="questions of each key")
    parser.add_argument("--asked", type=int, default=100, help="questions of each set")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.float32)
    base.to("cuda" if torch.cuda.is_available() else "cpu")

    def questions(name: str, split: Split, count: int) -> torch.Tensor:
        rows = read_examples((given.data or data_dir()) / f"{name}.{split}.jsonl")[:count]
        return represented(base, encode_within(rows, tokenizer, 512, [name]), 0, 4096)[:, MEAN]

    known = {name: questions(name, "train", given.known) for name in given.names}
    asked = {name: questions(name, "test", given.asked) for name in given.names}
    keys = LayerKeys()
    for name, own in known.items():
        keys.put(name, own)
    rows = [
        {
            "set": name,
            "asked": len(own),
            "right": keys.nearest(own, given.names).count(name) / len(own),
            "farther when left out": farther(known, asked, name),
        }
        for name, own in asked.items()
    ]
    count = sum(len(own) for own in asked.values())
    right = round(sum(row["right"] * row["asked"] for row in rows))
    for row in rows:
        print(
            f"{row['set']:16} {row['right']:7.1%} of {row['asked']} right, left out {row['farther when left out']:.2f}"
        )
    print(f"{right} of {count} find their own ({right / count:.1%})")
    if given.out:
        about = heading(f"python -m benchmarks.keys {' '.join(given.names)}", "splits by sha256 of the document id")
        given.out.write_text(json.dumps({**about, "rows": rows, "right": right / count}, indent=1) + "\n", "utf-8")


def farther(known: Mapping[str, torch.Tensor], asked: Mapping[str, torch.Tensor], out: str) -> float:
    """How likely a question of ``out``, of which there is no key, lies farther from the nearest one than another's."""
    names = [name for name in known if name != out]
    means = torch.stack([known[name].double().mean(0) for name in names])
    apart = torch.cat([known[name].double() - mean for name, mean in zip(names, means, strict=True)])
    covariance = apart.T @ apart / len(apart)
    covariance.diagonal().add_(SHRINKS * covariance.diagonal().mean())
    inverse = torch.linalg.inv(covariance)

    def distance(questions: Sequence[torch.Tensor]) -> torch.Tensor:
        off = torch.cat(list(questions)).double().unsqueeze(1) - means
        return torch.einsum("nkd,de,nke->nk", off, inverse, off).amin(1)

    own, others = distance([asked[out]]), distance([asked[name] for name in names])
    return float((own.unsqueeze(1) > others).double().mean())


if __name__ == "__main__":
    main()
