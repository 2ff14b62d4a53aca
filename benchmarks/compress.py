"""Many adapters in a compressed store: seconds, bytes, what is lost, and what of their gain is kept.

    molora train data math code medicine law ukrainian
    python -m benchmarks.compress --count 100 --basis 32 64
    python -m benchmarks.compress --count 100 --basis 64 --unrelated
    python -m benchmarks.compress --trained splits --basis 64    # of benchmarks/splits.py

Related: each is one of the starter's domain adapters with noise of the whole rank beside it, as if trained again on
other data; or was trained on other data, indeed. Unrelated: one such of each domain, and for the rest noise alone, as
large. The gain over the base is that of the first adapter of each domain, on the domain's test conversations.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from molora.adapter import Adapter
from molora.base import DEFAULT_BASE, load_base
from molora.compose.joint import squared
from molora.compose.store import CompressedStore, compress
from molora.factors import Factors, concatenated, of_adapter, write_factors
from molora.starter import starter_folder
from molora_training.data import data_dir, encode_within, read_examples
from molora_training.report import heading, line
from molora_training.speaker import Speaker

MOST = 1024  # tokens of a conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--basis", type=int, nargs="+", default=[64])
    parser.add_argument("--noise", type=float, default=0.3, help="norm of what is added, as a share of the adapter's")
    parser.add_argument("--unrelated", action="store_true", help="nothing in common but by domain, once each")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="adapters that lie there as DOMAIN-NUMBER instead"
    )
    parser.add_argument("--conversations", type=int, default=20, help="of each domain")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = trained(given.trained) if given.trained else made(given, Path(place))
        some: dict[str, str] = {}
        for name in folders:
            some.setdefault(name.rpartition("-")[0], name)
        loss = measure(given.conversations)
        base = {domain: loss(domain, None) for domain in some}
        raw = {domain: loss(domain, of_adapter(Adapter.load(folders[name]))) for domain, name in some.items()}
        rows = []
        for size in given.basis:
            started = time.perf_counter()
            report = compress(folders, Path(place) / f"store-{size}", basis=size, most_error=1.0)
            seconds = time.perf_counter() - started
            store = CompressedStore.load(report.folder)
            kept = [
                (base[domain] - loss(domain, store.factors(name))) / (base[domain] - raw[domain])
                for domain, name in some.items()
            ]
            row: dict[str, Any] = {"basis": size, "seconds": seconds, "share of the bytes": report.share}
            row |= {"error, median": report.median_error, "error, worst": report.worst_error}
            row |= {"gain kept, mean": sum(kept) / len(kept), "gain kept, least": min(kept)}
            rows.append({name: round(value, 4) for name, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        which = f"--count {given.count} --rank {given.rank} --noise {given.noise}"
        command = f"python -m benchmarks.compress {f'--trained {given.trained.name}' if given.trained else which}"
        command += f" --basis {' '.join(map(str, given.basis))}{' --unrelated' * given.unrelated}"
        about = heading(command, f"{given.conversations} test conversations of each of {len(some)} domains")
        must = [
            line("share of the bytes", rows[0]["share of the bytes"], 0.2, "lower"),
            line("gain kept, mean of the domains", rows[0]["gain kept, mean"], 0.99, "higher"),
        ]
        found = {**about, "threads": torch.get_num_threads(), "rows": rows, "must": must}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def trained(folder: Path) -> dict[str, Path]:
    """The adapters of a folder by name, in the order of their numbers."""
    found = [path.parent for path in folder.glob("*-*/adapter_config.json")]
    return {path.name: path for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))}


def made(given: argparse.Namespace, place: Path) -> dict[str, Path]:
    """Adapters made of the starter's of a domain, by name."""
    paths = sorted((starter_folder() / "adapters/domain").iterdir())
    domains = {path.name: of_adapter(Adapter.load(path)) for path in paths}
    folders: dict[str, Path] = {}
    for number in range(given.count):
        domain = list(domains)[number % len(domains)]
        folders[f"{domain}-{number}"] = place / f"{domain}-{number}"
        alone = given.unrelated and number >= len(domains)
        factors = disturbed(domains[domain], given.rank, given.noise, number, alone)
        write_factors(folders[f"{domain}-{number}"], factors, DEFAULT_BASE)
    return folders


def disturbed(factors: Factors, rank: int, noise: float, seed: int, alone: bool = False) -> Factors:
    """The same delta, and beside it noise of what is left of ``rank``; ``alone``: as large a noise in its place."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name, (A, B) in factors.items():
        more = rank if alone else rank - len(A)
        N, M = torch.randn(more, A.shape[1], generator=chance), torch.randn(len(B), more, generator=chance)
        share = (1.0 if alone else noise) * (squared(A.float(), B.float()) / squared(N, M)) ** 0.5
        found[name] = (N * share, M)
    return found if alone else concatenated([factors, found])


def measure(count: int) -> Callable[[str, Factors | None], float]:
    """Nats an answer token of a domain's test conversations, with an adapter or the base's own."""
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.float32)
    speaker = Speaker(base, tokenizer, batch=4)

    def loss(domain: str, factors: Factors | None) -> float:
        examples = read_examples(data_dir() / f"{domain}.test.jsonl")[:count]
        rows = encode_within(examples, tokenizer, MOST, [domain])
        found = speaker.losses(rows, None if factors is None else [factors] * len(rows))
        return float(found[:, 0].sum() / found[:, 1].sum())

    return loss


if __name__ == "__main__":
    main()
