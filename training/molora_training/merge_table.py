"""What is left of several adapters when they are made one? Every way of merging, beside routing and each alone.

Of n adapters each is asked about its own text. What counts is the share that is kept of what it gains there over the
base by itself: a mean over the adapters, so that none is bought by another.
"""

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save
from torch import nn

from molora import MoLoRAModel
from molora.adapter import Adapter
from molora.compose.merge import merge
from molora.compose.methods import OF_FACTORS, Method
from molora.errors import ConfigError
from molora.factors import Factors, of_adapter
from molora.personalize.generated import generated, stacked
from molora_training.contenders import own_base
from molora_training.data import Batch, Encoded, data_dir, encode_within, read_examples
from molora_training.evaluate import Losses, bootstrap, losses_of
from molora_training.parts import Part, file_name, finished, mark_of
from molora_training.report import heading, line, machine, write_report
from molora_training.soup import train_soup

MOST = 1024  # tokens of a conversation
RANK = 16  # of what ends in svd


@dataclass(frozen=True)
class MergeTableSettings:
    """What is compared.

    Args:
        model: a saved MoLoRA. layer: of which the adapters are merged, those that there is data of, in their order.
        data: prepared data, NAME.train.jsonl and NAME.test.jsonl of each.
        counts: of how many adapters; those that are more than there are become all.
        limit: test conversations of each.
        densities: of what prunes.
        soup_rows, soup_steps: conversations of each that a soup learns from, and its steps.
        batch_tokens: padded tokens in one forward. seed: of DARE and the soup.
    """

    model: Path
    layer: str = "domain"
    data: Path | None = None
    counts: tuple[int, ...] = (2, 4, 8)
    limit: int = 100
    densities: tuple[float, ...] = (0.2, 0.5)
    soup_rows: int = 100
    soup_steps: int = 100
    batch_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 2:
            raise ConfigError(f"counts are whole numbers from 2, not {list(self.counts)}.")
        if min(self.limit, self.batch_tokens, self.soup_rows) < 1:
            raise ConfigError("limit, batch_tokens and soup_rows must be whole numbers from 1.")


@dataclass(frozen=True)
class Way:
    """One way of answering for several adapters. measure: gives the losses on the text of each, by name, and what else
    its row says."""

    title: str
    names: Sequence[str]
    measure: Callable[[], Part]


def run(
    settings: MergeTableSettings, out: Path, command: str, share: tuple[int, int] = (0, 1)
) -> dict[str, Any] | None:
    """Measures the merges that are not measured yet and writes ``out`` once all are.

    Args:
        settings: what is compared.
        out: the report; what is finished lies in a hidden folder beside it.
        command: to be named in it.
        share: (i, n): of n processes the i-th, which measures every n-th way.

    Returns:
        The report, or None while ways are missing.

    Raises:
        ConfigError: there is data of fewer than two adapters of the layer.
    """
    cuda = torch.cuda.is_available()
    model = MoLoRAModel.from_pretrained(settings.model, dtype=torch.bfloat16, device_map="cuda" if cuda else None)
    table = MergeTable(model.eval(), settings)
    sizes = sorted({min(count, len(table.names)) for count in settings.counts})
    bounds = table.bounds()  # of all: each count takes its own from them
    every = [*bounds, *(way for count in sizes for way in table.ways(count))]

    def make(index: int) -> Part:
        found = every[index].measure()
        print(f"{every[index].title}, {len(every[index].names)} adapters", file=sys.stderr, flush=True)
        return found

    names = [file_name(f"{len(one.names)} {one.title}") for one in every]
    kept = finished(out.parent / f".{out.stem}", names, table.mark(), share, make)
    if kept is None:
        return None
    rows = []
    for count in sizes:
        own = [(way, part) for way, part in zip(every, kept, strict=True) if way in bounds or len(way.names) == count]
        rows += [{"adapters": count, **row(way.title, table.names[:count], part, *kept[:2])} for way, part in own]
    report = {
        **heading(command, f"{settings.limit} test conversations of each adapter's own data at most"),
        "seed": settings.seed,
        "names": table.names,
        "rows": rows,
    }
    report["must"] = must(rows)
    write_report(report, out)
    return report


class MergeTable:
    """The adapters of a layer, each with text of its own."""

    def __init__(self, model: MoLoRAModel, settings: MergeTableSettings) -> None:
        self.model, self.settings = model, settings
        folder = settings.data or data_dir()
        there = [name for name in model.stack[settings.layer].adapters if (folder / f"{name}.test.jsonl").is_file()]
        if len(there) < 2:
            raise ConfigError(f"{folder} has test data of {len(there)} adapters of {settings.layer!r}; two are needed.")
        self.names = there
        self.test = {name: self._read(folder, name, "test", settings.limit) for name in there}
        self.train = {name: self._read(folder, name, "train", settings.soup_rows) for name in there}
        self.paths = {name: model.adapters[f"{settings.layer}/{name}"].path for name in there}
        self.pad = int(model.tokenizer.pad_token_id or 0)

    def mark(self) -> str:
        """Changes with anything that a way depends on, but for how many adapters are merged."""
        folder, router = self.settings.data or data_dir(), self.model.router
        files = [folder / f"{name}.{split}.jsonl" for name in self.names for split in ("train", "test")]
        record = {key: one for key, one in asdict(self.settings).items() if key not in ("model", "data", "counts")}
        about = [self.names, str(self.model.base_name), self.model.stack[self.settings.layer].top_k, machine()]
        if router is not None:
            weights = {name: tensor.contiguous().cpu() for name, tensor in router.state_dict().items()}
            about += [router.rows, repr(getattr(router, "config", None)), hashlib.sha256(save(weights)).hexdigest()]
        return mark_of([record, about], *self.paths.values(), *files)

    def bounds(self) -> list[Way]:
        """What every merge lies between: the base, and each adapter on its own text."""

        def alone() -> Part:
            own = {name: self._losses(name, of_adapter(Adapter.load(path))) for name, path in self.paths.items()}
            return {"losses": as_lists(own)}

        def base() -> Part:
            return {"losses": as_lists({name: self._losses(name, None) for name in self.names})}

        return [
            Way("base", self.names, base),
            Way("each on its own text", self.names, alone),
        ]

    def ways(self, count: int) -> list[Way]:
        """To make one of the first ``count`` adapters."""
        names = self.names[:count]
        found = []
        if self.model.router is not None and self.model.stack[self.settings.layer].routed:
            found.append(Way("routed by token", names, partial(self._routed, names)))
        return [*found, *(Way(title, names, partial(self._merged, names, make)) for title, make in self._merges(names))]

    def _merged(self, names: Sequence[str], make: Callable[[Path], tuple[Path, float | None]]) -> Part:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.monotonic()
            folder, error = make(Path(scratch) / "merged")
            seconds = time.monotonic() - started
            factors = of_adapter(Adapter.load(folder))
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        losses = {name: self._losses(name, factors) for name in names}
        return {"losses": as_lists(losses), "seconds": seconds, "bytes": size, "error": error}

    def _merges(self, names: Sequence[str]) -> list[tuple[str, Callable[[Path], tuple[Path, float | None]]]]:
        paths = {name: self.paths[name] for name in names}
        ranks = {rank for path in paths.values() for rank in Adapter.load(path).ranks}
        found: list[tuple[str, Callable[[Path], tuple[Path, float | None]]]] = []

        def add(title: str, method: Method, weight: float, density: float = 1.0) -> None:
            cut = method == "svd" or method.endswith("_svd")

            def make(out: Path) -> tuple[Path, float | None]:
                report = merge(
                    paths, out, method, weights=[weight] * len(paths), density=density,
                    rank=RANK if cut else None, seed=self.settings.seed,
                )  # fmt: skip
                return report.folder, report.error

            found.append((title, make))

        add("cat, 1/n each", "cat", 1 / len(names))
        add("cat, 1 each", "cat", 1.0)
        add(f"svd to rank {RANK}, 1/n each", "svd", 1 / len(names))
        for method in get_args(Method):
            if method in ("cat", "svd") or (method in OF_FACTORS and len(ranks) > 1):
                continue
            # TIES divides by those that agree, so that its weights are 1.
            weight = 1.0 if "ties" in method or method == "knots" else 1 / len(names)
            for density in (1.0,) if method == "linear" else self.settings.densities:
                add(method if method == "linear" else f"{method}, {density:g} kept", method, weight, density)
        found.append(("LoRA Soups, CAT", self._soup(paths)))
        return found

    def _soup(self, paths: Mapping[str, Path]) -> Callable[[Path], tuple[Path, None]]:
        def make(out: Path) -> tuple[Path, None]:
            rows = [row for name in paths for row in self.train[name]]
            steps = self.settings.soup_steps
            train_soup(
                own_base(self.model), paths, rows, out, self.pad, steps=steps, seed=self.settings.seed,
                batch_tokens=4096,
            )  # fmt: skip
            return out, None

        return make

    def _routed(self, names: Sequence[str]) -> Part:
        """The router chooses among these and none."""
        selection: dict[str, Any] = {layer.name: None for layer in self.model.stack.layers}
        selection[self.settings.layer] = list(names)
        acting = partial(self.model.routing.active, lambda: self.model._resolve(selection))
        return {"losses": as_lists({name: self._losses(name, None, acting()) for name in names})}

    def _losses(self, name: str, factors: Factors | None, acting: AbstractContextManager[Any] | None = None) -> Losses:
        """Of the adapter's own text, one domain."""
        base: Any = self.model.base
        added = stacked([] if factors is None else [factors], self.model.device)  # one for all conversations
        head = base.get_output_embeddings()
        head = head if type(head) is nn.Linear else None  # one that is adapted sees every token

        def logits(batch: Batch) -> torch.Tensor:
            found: torch.Tensor = base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            return found

        with acting or nullcontext(), generated(base, added):
            rows, device = self.test[name], self.model.device
            return losses_of(logits, rows, 1, self.pad, device, self.settings.batch_tokens, head)

    def _read(self, folder: Path, name: str, split: str, limit: int) -> list[Encoded]:
        examples = read_examples(folder / f"{name}.{split}.jsonl")
        tokenizer: Any = self.model.tokenizer
        return encode_within(examples[:limit], tokenizer, MOST, [name])


def as_lists(losses: Mapping[str, Losses]) -> dict[str, dict[str, list[float]]]:
    """By adapter, as JSON keeps them: each is of one domain."""
    return {name: {what: some.flatten().tolist() for what, some in vars(one).items()} for name, one in losses.items()}


def from_lists(lists: Mapping[str, Sequence[float]]) -> Losses:
    """What :func:`as_lists` made of one adapter's."""
    columns = {what: torch.tensor(some, dtype=torch.float64).unsqueeze(1) for what, some in lists.items()}
    return Losses(**{what: some if what == "loss" else some.float() for what, some in columns.items()})


def row(title: str, names: Sequence[str], part: Part, base: Part, alone: Part) -> dict[str, Any]:
    """The share of the adapters' gains that is kept, with its interval over conversations, the mean loss, and the mean
    share of short answers that are right, over those that have any; then what else was measured.

    Args:
        title: of the way. names: of the adapters.
        part: the way's; base, alone: of the base, and of each adapter on its own text.
    """
    lower, upper, losses = ({name: from_lists(one["losses"][name]) for name in names} for one in (base, alone, part))
    least = min(len(losses[name].loss) for name in names)

    def kept(index: torch.Tensor) -> torch.Tensor:
        shares = []
        for name in names:
            most, own, mine = (some[name].loss[:least, 0][index].sum(-1) for some in (lower, upper, losses))
            shares.append((most - mine) / (most - own))
        return torch.stack(shares).mean(0)

    nats = {name: losses[name].mean for name in names}
    right = [losses[name].accuracy for name in names if losses[name].asked.any()]
    return {
        "way": title,
        "gain_kept": float(kept(torch.arange(least))),
        "gain_kept_interval": list(bootstrap(kept, least)),
        "loss": statistics.mean(nats.values()),
        "losses": nats,
        "short_answers": statistics.mean(right) if right else None,
        **{what: value for what, value in part.items() if what != "losses"},
    }


def must(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether a soup is the best of the merges, by how many adapters there are."""
    lines = []
    for count in sorted({row["adapters"] for row in rows}):
        merges = [row for row in rows if row["adapters"] == count and "bytes" in row]
        soup = next(row["gain_kept"] for row in merges if row["way"].startswith("LoRA Soups"))
        best = max((row for row in merges if not row["way"].startswith("LoRA Soups")), key=lambda row: row["gain_kept"])
        name = f"{count} adapters: gain that a soup keeps above the best other merge"
        lines.append(line(name, soup - best["gain_kept"], 0.0, "higher", best["way"]))
    return lines
