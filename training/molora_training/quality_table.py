"""Every contender beside the router on held-out text that changes its domain in four ways, in one command.

The sets: conversations that change at each turn, the same in prompt forms that training never saw, documents of several
domains' problems, and two questions in one turn. What a contender closes is its share of the way from the base to the
label oracle, which sends each token to its own domain's adapter.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.adapter import Adapter
from molora.errors import ConfigError, DataError
from molora_training.data import (
    Batch,
    Encoded,
    Example,
    encode_within,
    mix,
    mix_documents,
    mix_in_a_turn,
    read_examples,
)
from molora_training.evaluate import LAYER, LabelRouter, Losses, best_by_sequence, bootstrap, losses, routed_by
from molora_training.merge import Method, merge
from molora_training.report import heading, line, write_report
from molora_training.rivals import Centroids, Classifier, Features, Rival, Scope

COUNT = 300  # sequences of each set
TRAINED = 400  # training examples of each domain that rivals learn from
MAX_TOKENS = 2048
TURNS, UNSEEN, DOCUMENTS, IN_A_TURN = "turns", "turns, unseen forms", "documents", "two in a turn"
MERGES: dict[str, tuple[Method, float]] = {  # way and density
    "linear merge": ("linear", 1.0), "TIES": ("ties", 0.2), "DARE-TIES": ("dare_ties", 0.5),
    "magnitude merge": ("magnitude_prune", 0.5),
}  # fmt: skip


@dataclass
class Row:
    """A contender's losses by set; of single domains, by name."""

    name: str
    kind: str
    sets: dict[str, Losses] = field(default_factory=dict)
    single: dict[str, Losses] = field(default_factory=dict)


class QualityTable:
    """The held-out sets and the contenders of one saved MoLoRA.

    Args:
        model: with a learned router; its domain layer is measured.
        data: prepared data of every domain of that layer.
        limit: use only so many sequences of each set (0: all), and for rivals four times as many training examples of
            each domain.
        batch_tokens: padded tokens in one forward.

    Raises:
        ConfigError: the model has no learned router, or fewer than two domains. DataError: a domain has no data.
    """

    def __init__(self, model: MoLoRAModel, data: Path, limit: int = 0, batch_tokens: int = 8192) -> None:
        if not isinstance(model.router, Router):
            raise ConfigError("This MoLoRA has no learned router to be measured.")
        self.domains = list(model.stack[LAYER].adapters)
        if len(self.domains) < 2:
            raise ConfigError(f"The layer '{LAYER}' has {len(self.domains)} adapters: there is nothing to route.")
        self.model, self.data, self.batch_tokens = model, data, batch_tokens
        self.trained = min(TRAINED, 4 * limit) if limit else TRAINED
        self.off = {layer.name: None for layer in model.stack.layers if layer.name != LAYER}
        some = slice(limit or None)
        test = {name: read_examples(data / f"{name}.test.jsonl") for name in self.domains}
        unseen = {name: [example for example in rows if example.unseen] for name, rows in test.items()}
        if empty := [name for name, rows in unseen.items() if not rows]:
            raise DataError(f"{empty[0]} has no test example in a form that training never saw.")
        self.sets = {
            TURNS: self._encode(mix(test, "test", COUNT)[some]),
            UNSEEN: self._encode(mix(unseen, "test", COUNT, seed=1)[some]),
            DOCUMENTS: self._encode(mix_documents(test, "test", COUNT)[some]),
            IN_A_TURN: self._encode(mix_in_a_turn(test, "test", COUNT)[some]),
        }
        self.single = {name: self._encode(rows[some]) for name, rows in test.items()}

    def _encode(self, rows: Sequence[Any]) -> list[Encoded]:
        return encode_within(rows, self.model.tokenizer, MAX_TOKENS, self.domains)

    def measure(self, name: str, kind: str, choice: Any, before: Callable[[Batch], None] | None = None) -> Row:
        """A contender under the selection ``choice`` of the domain layer; ``before`` sees each batch."""

        def of(rows: Sequence[Encoded]) -> Losses:
            return losses(self.model, rows, {**self.off, LAYER: choice}, len(self.domains), before, self.batch_tokens)

        row = Row(name, kind, {s: of(rows) for s, rows in self.sets.items()})
        row.single = {domain: of(rows) for domain, rows in self.single.items()}
        return row

    def rows(self, work: Path) -> Iterator[Row]:
        """All contenders, the base and the label oracle first. Merged adapters lie in ``work`` for a while."""
        yield self.measure("base", "base", None)
        oracle = LabelRouter(self.model, self.domains)
        with routed_by(self.model, oracle):
            yield self.measure("label oracle", "oracle", "auto", oracle.see)
        singles = [self.measure(f"{name} alone", "adapter", name) for name in self.domains]
        yield from singles
        yield _best_of(singles)
        share = LabelRouter(self.model, self.domains, share=True)
        with routed_by(self.model, share, top_k=len(self.domains)):
            yield self.measure("uniform merge", "merge", "auto", share.see)
        for name, (method, density) in MERGES.items():
            with self._merged(work, method, density) as adapter:
                yield self.measure(name, "merge", adapter)
        with routed_by(self.model, oracle):
            for name, rival in self._rivals():
                yield self.measure(name, f"by {rival.scope}", "auto", _seen_by(oracle, rival))
        for weights, top_k in (("unit", 1), ("softmax", 2)):
            with routed_by(self.model, self.model.router, top_k, weights):
                yield self.measure(f"MoLoRA, top-{top_k} {weights}", "router", "auto")

    def _rivals(self) -> Iterator[tuple[str, Rival]]:
        train: list[Example] = []
        for name in self.domains:
            train += read_examples(self.data / f"{name}.train.jsonl")[: self.trained]
        features = Features(self.model, self._encode(train), self.batch_tokens)
        scopes: tuple[Scope, ...] = ("sequence", "turn")
        for scope in scopes:
            yield f"classifier by {scope}", Classifier(self.model, self.domains, scope, features)
            yield f"nearest centroid by {scope}", Centroids(self.model, self.domains, scope, features)

    @contextmanager
    def _merged(self, work: Path, method: Method, density: float) -> Iterator[str]:
        """All adapters of the layer as one more of it, for a while. PEFT merges them on a base of its own."""
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            paths = {name: Path(str(self.model.stack[LAYER].adapters[name])) for name in self.domains}
            ranks = {rank for path in paths.values() for rank in Adapter.load(path).ranks}
            way: Any = method if len(ranks) == 1 else f"{method}_svd" if method != "linear" else "svd"
            merged = merge(_plain(self.model), paths, Path(folder) / "merged", way, density=density)
            self.model.add_adapter(LAYER, "merged", merged)
            try:
                yield "merged"
            finally:
                self.model.remove_adapter(LAYER, "merged")


def run(folder: Path, data: Path, out: Path, command: str, limit: int = 0, batch_tokens: int = 8192) -> dict[str, Any]:
    """Measures a saved MoLoRA; the rest as of :func:`fill`.

    Raises:
        ConfigError, DataError: of :class:`QualityTable`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoLoRAModel.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    return fill(QualityTable(model, data, limit, batch_tokens), out, command)


def fill(table: QualityTable, out: Path, command: str) -> dict[str, Any]:
    """Measures all contenders and writes ``out`` (the project's results format) after each."""
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in {**table.sets, **table.single}.items())
    report = heading(command, f"test split by sha256 of the task or document id: {counts}")
    found: list[Row] = []
    for row in table.rows(out.parent / f".{out.stem}"):
        found.append(row)
        if len(found) < 2:  # what is closed needs the base and the oracle
            continue
        report |= {"rows": [figures(one, found[0], found[1]) for one in found], "must": must(found)}
        write_report(report, out)
        shown = ", ".join(f"{name} {values['gap_closed']:.1%}" for name, values in report["rows"][-1]["sets"].items())
        print(f"{row.name}: {shown}", flush=True)
    return report


def figures(row: Row, base: Row, oracle: Row) -> dict[str, Any]:
    """A row of the report."""
    sets = {}
    for name, own in row.sets.items():
        b, o = base.sets[name], oracle.sets[name]
        everything = torch.arange(len(own.loss))[None]
        share = partial(_share, base=b, oracle=o, own=own)
        sets[name] = {
            "loss": own.mean,
            "domain_mean": own.domain_mean,
            "gap_closed": float(share(everything)),
            "gap_closed_interval": list(bootstrap(share, len(own.loss))),
            "gap_closed_domain_mean": (b.domain_mean - own.domain_mean) / (b.domain_mean - o.domain_mean),
        }
    single = {name: own.mean for name, own in row.single.items()}
    return {"contender": row.name, "kind": row.kind, "sets": sets, "single": single}


def must(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines that the router has to reach; none before it is measured."""
    routers = [row for row in rows if row.kind == "router"]
    if not routers:
        return []
    base, oracle, mine = rows[0], rows[1], routers[0]
    own = figures(mine, base, oracle)["sets"]
    lines = []
    for name, bar in ((TURNS, 0.965), (DOCUMENTS, 0.965), (UNSEEN, 0.96), (IN_A_TURN, 0.82)):
        lines.append(line(f"{name}: share of the gap closed", own[name]["gap_closed"], bar, "higher", name))
        if name != UNSEEN:
            value = own[name]["gap_closed_domain_mean"]
            lines.append(line(f"{name}: share of the gap closed, mean of domains", value, bar, "higher"))
    for other in rows:
        if other.kind in ("merge", "sequence-oracle"):
            for name in (TURNS, DOCUMENTS):
                lines.append(_below(mine, other, name, 0.15))
    for other in rows:
        if other.kind == "by turn":
            lines.append(_below(mine, other, TURNS, 0.0))
            lines.append(_below(mine, other, IN_A_TURN, 0.15))
        if other.kind == "adapter":
            domain = other.name.removesuffix(" alone")
            value = mine.single[domain].mean - other.single[domain].mean
            lines.append(line(f"single-domain {domain}: loss above its own adapter's", value, 0.01, "lower"))
    return lines


def _below(mine: Row, other: Row, name: str, bar: float) -> dict[str, Any]:
    """How many nats a token the router is below another contender; it counts if the interval is above 0 as well."""
    a, b = mine.sets[name], other.sets[name]

    def difference(index: torch.Tensor) -> torch.Tensor:
        loss = b.loss.sum(1)[index].sum(-1) - a.loss.sum(1)[index].sum(-1)
        return loss / a.tokens.sum(1).double()[index].sum(-1)

    value = float(difference(torch.arange(len(a.loss))[None]))
    low, high = bootstrap(difference, len(a.loss))
    found = line(f"{name}: below {other.name}, nats a token", value, bar, "higher", f"95% [{low:.3f}, {high:.3f}]")
    return {**found, "holds": found["holds"] and (low > 0 or bar == 0.0)}


def _share(index: torch.Tensor, base: Losses, oracle: Losses, own: Losses) -> torch.Tensor:
    b, o, x = (one.loss.sum(1)[index].sum(-1) for one in (base, oracle, own))
    return (b - x) / (b - o)


def _seen_by(oracle: LabelRouter, rival: Rival) -> Callable[[Batch], None]:
    def see(batch: Batch) -> None:
        oracle.see(rival.labels(batch))

    return see


def _best_of(singles: Sequence[Row]) -> Row:
    """The adapter with the lowest loss on each sequence, in hindsight."""

    row = Row("per-sequence oracle", "sequence-oracle")
    row.sets = {name: best_by_sequence([single.sets[name] for single in singles]) for name in singles[0].sets}
    row.single = {name: best_by_sequence([single.single[name] for single in singles]) for name in singles[0].single}
    return row


def _plain(model: MoLoRAModel) -> Any:
    """The base's own modules in a model of their own, which PEFT may wrap: the weights are the same memory. It is never
    run, so what is no weight (rotary tables) may stay without one."""
    kind = type(model.base)
    with torch.device("meta"):
        plain = kind(model.base.config)
    plain.load_state_dict(model.base.state_dict(), assign=True)
    plain.tie_weights()
    return plain.eval()
