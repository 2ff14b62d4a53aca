"""Everything that a router by token is compared with, each measured on the same held-out text."""

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.adapter import Adapter
from molora.compose.merge import merge
from molora.compose.methods import Method
from molora_training.attention import attend_causally
from molora_training.batches import plan_steps, rounded
from molora_training.data import Batch, Encoded
from molora_training.evaluate import (
    INTEGRATION,
    LAYER,
    TOGETHER,
    Deciding,
    Holding,
    LabelRouter,
    Losses,
    best_by_sequence,
    losses,
    losses_of,
    right_by_position,
    routed_by,
)
from molora_training.peft_routers import arrow, train_xlora
from molora_training.quality_sets import MAX_TOKENS, TURNS, QualitySets, after
from molora_training.rivals import Centroids, Classifier, Features, Rival, Scope
from molora_training.soup import learn, train_soup

MERGES: dict[str, tuple[Method, float]] = {  # way and density
    "linear merge": ("linear", 1.0), "TIES": ("ties", 0.2), "DARE-TIES": ("dare_ties", 0.5),
    "magnitude merge": ("magnitude_prune", 0.5),
}  # fmt: skip
WEIGHTS = (("unit", 1), ("softmax", 2))  # and top-k; the second of the first router alone
MARGINS = (1.0, 2.0)  # nats by which another adapter must be better to be turned to
FULL_TOKENS, FULL_RATE = 8192, 1e-4  # of a step that trains all weights
LEARNT_STEPS, LEARNT_TOKENS = 100, 4096  # of what learns on the same mixed text as a router, and tokens in a step
CHOSEN_BY = ("base", "oracle", "adapter", "router")  # kinds of contender that a router is chosen by, on validation
Before = Callable[[Batch], None]


@dataclass
class Row:
    """A contender's losses by set, and of single domains by name; ``right``: share of tokens routed to their domain."""

    name: str
    kind: str
    sets: dict[str, Losses] = field(default_factory=dict)
    single: dict[str, Losses] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str  # base, prompt, oracle, adapter, multitask, full, merge, peft router, by sequence, by turn, router
    measure: Callable[[], Row]
    weights: str = ""  # of what was trained for it: another one is to be measured anew


class Contenders:
    """The contenders of one MoLoRA on its sets.

    Args:
        model: with the adapters of the domain layer; its own router is the first of ``routers``.
        sets: what is measured.
        routers: by name, for the same stack.
        work: where merged adapters lie for a while.
        batch_tokens: padded tokens in one forward.
    """

    def __init__(
        self,
        model: MoLoRAModel,
        sets: QualitySets,
        routers: Mapping[str, Router],
        work: Path,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.sets, self.routers, self.work, self.batch_tokens = model, sets, routers, work, batch_tokens
        self.domains = sets.domains
        self.off = {layer.name: None for layer in model.stack.layers if layer.name != LAYER}

    def all(self) -> list[Contender]:
        """The base and the label oracle first."""
        return [one for one in self._all() if self.sets.split == "test" or one.kind in CHOSEN_BY]

    def _all(self) -> list[Contender]:
        found = [
            self._plain("base", "base", {LAYER: None}),
            Contender("label oracle", "oracle", self._oracle),
            Contender("base, one example of each domain", "prompt", self._few_shot),
        ]
        found += [self._plain(f"{name} alone", "adapter", {LAYER: name}) for name in self.domains]
        if TOGETHER in self.off:
            for name in self.model.stack[TOGETHER].adapters:
                found.append(self._plain(f"{name}: one LoRA on all data", "multitask", {LAYER: None, TOGETHER: name}))
            found.append(Contender("all weights on all data", "full", self._full))
        found.append(Contender("uniform merge", "merge", self._uniform))
        found += [Contender(name, "merge", self._merge(name)) for name in MERGES]
        found.append(Contender("LoRA Soups, CAT", "merge", self._soup))
        for top_k in sorted({1, min(3, len(self.domains))}):
            found.append(Contender(f"Arrow, top-{top_k}", "peft router", self._arrow(top_k)))
        found.append(Contender("X-LoRA", "peft router", self._xlora))
        scopes: tuple[Scope, ...] = ("sequence", "turn")
        for scope in scopes:
            found.append(Contender(f"classifier by {scope}", f"by {scope}", self._rival(Classifier, scope)))
            found.append(Contender(f"nearest centroid by {scope}", f"by {scope}", self._rival(Centroids, scope)))
        if self.routers and INTEGRATION in self.off:
            (name, router), (weights, top_k) = next(iter(self.routers.items())), WEIGHTS[0]
            shown = f"MoLoRA {name}, integrated, top-{top_k} {weights}"
            measure = self._router(name, weights, top_k, integrated=True)
            found.append(Contender(shown, "integrated", measure, _digest(router)))
        for place, (name, router) in enumerate(self.routers.items()):
            digest = _digest(router)
            for weights, top_k in WEIGHTS[: 2 if place == 0 else 1]:
                shown = f"MoLoRA {name}, top-{top_k} {weights}"
                found.append(Contender(shown, "router", self._router(name, weights, top_k), digest))
        if self.routers:
            name, router = next(iter(self.routers.items()))
            digest = _digest(router)
            for margin in MARGINS:
                shown = f"MoLoRA {name}, held by {margin:g} nats"
                found.append(Contender(shown, "router", self._held(name, margin), digest))
            shown = f"MoLoRA {name}, decided once an answer"
            found.append(Contender(shown, "router", self._decided(name), digest))
        return found

    def by_logits(self, name: str, kind: str, logits: Callable[[Batch], torch.Tensor], base: Any) -> Row:
        """A contender that is no MoLoRA, on a base of its own."""

        def of(rows: Sequence[Encoded]) -> Losses:
            head = base.get_output_embeddings()
            return losses_of(logits, rows, len(self.domains), self.pad, self.model.device, self.batch_tokens, head)

        row = Row(name, kind, {s: of(rows) for s, rows in self.sets.mixed.items()})
        row.single = {domain: of(rows) for domain, rows in self.sets.single.items()}
        return row

    def measured(self, name: str, kind: str, choice: dict[str, Any], before: Before | None = None) -> Row:
        """A contender under a selection; ``before`` sees each batch."""

        def of(rows: Sequence[Encoded]) -> Losses:
            return losses(self.model, rows, {**self.off, **choice}, len(self.domains), before, self.batch_tokens)

        row = Row(name, kind, {s: of(rows) for s, rows in self.sets.mixed.items()})
        row.single = {domain: of(rows) for domain, rows in self.sets.single.items()}
        return row

    def _plain(self, name: str, kind: str, choice: dict[str, Any]) -> Contender:
        return Contender(name, kind, lambda: self.measured(name, kind, choice))

    def _oracle(self) -> Row:
        oracle = LabelRouter(self.model, self.domains)
        with routed_by(self.model, oracle):
            return self.measured("label oracle", "oracle", {LAYER: "auto"}, oracle.see)

    def _few_shot(self) -> Row:
        shots, row = self.sets.shots(), Row("base, one example of each domain", "prompt")
        for name, rows in self.sets.mixed.items():
            longer = [after(shots, one) for one in rows]
            off = {**self.off, LAYER: None}
            row.sets[name] = losses(self.model, longer, off, len(self.domains), None, self.batch_tokens)
        return row

    def _uniform(self) -> Row:
        share = LabelRouter(self.model, self.domains, share=True)
        with routed_by(self.model, share, top_k=len(self.domains)):
            return self.measured("uniform merge", "merge", {LAYER: "auto"}, share.see)

    def _merge(self, name: str) -> Callable[[], Row]:
        def measure() -> Row:
            with self._merged(*MERGES[name]) as adapter:
                return self.measured(name, "merge", {LAYER: adapter})

        return measure

    def _full(self) -> Row:
        """All weights of the base, trained for an epoch on what all adapters learnt."""
        base = own_base(self.model, torch.float32).requires_grad_(True)
        kind, rows = self.model.device.type, self.sets.questions(most=None)

        def logits(batch: Batch) -> torch.Tensor:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                found: torch.Tensor = base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            return found

        captured = attend_causally(base, rounded(MAX_TOKENS)) and kind == "cuda"
        steps = len(plan_steps([len(row.input_ids) for row in rows], FULL_TOKENS, 1, seed=0))
        learn(
            logits, list(base.parameters()), rows, self.pad, self.model.device, steps=steps, learning_rate=FULL_RATE,
            batch_tokens=FULL_TOKENS, seed=0, captured=captured, name="all weights",
        )  # fmt: skip
        return self.by_logits("all weights on all data", "full", logits, base)

    def _soup(self) -> Row:
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            soup = train_soup(
                own_base(self.model), self.paths, self.sets.training(), Path(folder) / "soup", self.pad,
                steps=LEARNT_STEPS, batch_tokens=LEARNT_TOKENS,
            )  # fmt: skip
            with self._added(soup) as name:
                return self.measured("LoRA Soups, CAT", "merge", {LAYER: name})

    def _arrow(self, top_k: int) -> Callable[[], Row]:
        def measure() -> Row:
            base = own_base(self.model)
            with arrow(base, self.paths, top_k) as logits:
                return self.by_logits(f"Arrow, top-{top_k}", "peft router", logits, base)

        return measure

    def _xlora(self) -> Row:
        base = own_base(self.model)
        with train_xlora(
            base, self.paths, self.sets.training(), self.pad, steps=LEARNT_STEPS, batch_tokens=LEARNT_TOKENS
        ) as logits:
            return self.by_logits("X-LoRA", "peft router", logits, base)

    @property
    def pad(self) -> int:
        return int(self.model.tokenizer.pad_token_id or 0)

    @contextmanager
    def _merged(self, method: Method, density: float) -> Iterator[str]:
        """All adapters of the layer as one."""
        ranks = {rank for path in self.paths.values() for rank in Adapter.load(path).ranks}
        way: Any = method if len(ranks) == 1 else f"{method}_svd" if method != "linear" else "svd"
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            report = merge(self.paths, Path(folder) / "merged", way, density=density)
            with self._added(report.folder) as name:
                yield name

    @contextmanager
    def _added(self, path: Path) -> Iterator[str]:
        """One more adapter of the layer, for a while."""
        self.model.add_adapter(LAYER, "merged", path)
        try:
            yield "merged"
        finally:
            self.model.remove_adapter(LAYER, "merged")

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(str(self.model.stack[LAYER].adapters[name])) for name in self.domains}

    @cached_property
    def _features(self) -> Features:
        return Features(self.model, self.sets.questions(), self.batch_tokens)

    def _rival(self, kind: type[Classifier] | type[Centroids], scope: Scope) -> Callable[[], Row]:
        def measure() -> Row:
            rival: Rival = kind(self.model, self.domains, scope, self._features)
            oracle = LabelRouter(self.model, self.domains)
            name = f"{'classifier' if kind is Classifier else 'nearest centroid'} by {scope}"
            with routed_by(self.model, oracle):
                return self.measured(name, f"by {scope}", {LAYER: "auto"}, lambda b: oracle.see(rival.labels(b)))

        return measure

    def _router(self, name: str, weights: str, top_k: int, integrated: bool = False) -> Callable[[], Row]:
        def measure() -> Row:
            shown = f"MoLoRA {name}, {'integrated, ' * integrated}top-{top_k} {weights}"
            choice = {LAYER: "auto"}
            if integrated:
                choice[INTEGRATION] = next(iter(self.model.stack[INTEGRATION].adapters))
            with routed_by(self.model, self.routers[name], top_k, weights):
                row = self.measured(shown, "integrated" if integrated else "router", choice)
                row.right = right_by_position(self.model, self.sets.mixed[TURNS], self.domains, self.batch_tokens)
                return row

        return measure

    def _held(self, name: str, margin: float) -> Callable[[], Row]:
        def measure() -> Row:
            router = self.routers[name]
            rows = [[router.rows.index(row) for row in layer.rows] for layer in self.model.routing.layers if layer.rows]
            with routed_by(self.model, Holding(router, rows, margin)):
                row = self.measured(f"MoLoRA {name}, held by {margin:g} nats", "router", {LAYER: "auto"})
                row.right = right_by_position(self.model, self.sets.mixed[TURNS], self.domains, self.batch_tokens)
                return row

        return measure

    def _decided(self, name: str) -> Callable[[], Row]:
        def measure() -> Row:
            router = Deciding(self.routers[name])
            with routed_by(self.model, router):
                return self.measured(f"MoLoRA {name}, decided once an answer", "router", {LAYER: "auto"}, router.see)

        return measure


def _digest(router: Router) -> str:
    digest = hashlib.sha256()
    for tensor in router.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def best_of(singles: Sequence[Row]) -> Row:
    """The adapter with the lowest loss on each sequence, in hindsight."""
    row = Row("per-sequence oracle", "sequence-oracle")
    row.sets = {name: best_by_sequence([single.sets[name] for single in singles]) for name in singles[0].sets}
    row.single = {name: best_by_sequence([single.single[name] for single in singles]) for name in singles[0].single}
    return row


def own_base(model: MoLoRAModel, dtype: torch.dtype | None = None) -> Any:
    """A copy of the base in a model of its own, on its device, which others may wrap and change."""
    base = model.base
    plain = type(base)(copy.deepcopy(base.config)).to(dtype or base.dtype)
    plain.load_state_dict(base.state_dict())
    return plain.to(model.device).eval().requires_grad_(False)
