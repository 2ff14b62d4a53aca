"""The main results: every contender on held-out single-domain and mixed text, from saved models, in one command."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.errors import ConfigError
from molora.saved import load
from molora_training.data import DOMAINS, Encoded, encode_within, mix, read_examples
from molora_training.evaluate import (
    LAYER,
    LabelRouter,
    Losses,
    best_by_sequence,
    bootstrap,
    losses,
    right_by_position,
    routed_by,
)
from molora_training.report import heading, line, write_report

OFF = {"personality": None, "user": None}
SINGLE_TOLERANCE = 0.03
MIXED = 300


@dataclass
class Contender:
    """One row of the table."""

    name: str
    kind: str
    mixed: Losses
    single: dict[str, Losses]
    positions: dict[str, float] | None = None


def run(
    model_folder: Path,
    routers: Path | None,
    data: Path,
    out: Path,
    command: str,
    batch_tokens: int = 8192,
    limit: int = 0,
) -> dict[str, Any]:
    """Measures and writes ``out`` (JSON in the project's results format).

    Args:
        model_folder: the saved MoLoRA, whose router is the default.
        routers: folder of saved MoLoRAs with other routers for the same adapters; None: only its own.
        data: prepared data.
        out: the JSON file.
        command: to be named in it.
        batch_tokens: padded tokens in one forward.
        limit: use only so many sequences of each set (0: all), for a quick look.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoLoRAModel.from_pretrained(model_folder, dtype=torch.bfloat16).to(device)
    if not isinstance(model.router, Router):
        raise ConfigError(f"{model_folder} has no learned router to be measured.")
    domains = [name for name in DOMAINS if name in model.stack[LAYER].adapters]
    test = _Test(model, domains, data, limit, batch_tokens)
    contenders = test.baselines()
    variants: dict[str, Any] = {"as saved": model.router}
    if routers is not None:
        folders = [path for path in sorted(routers.iterdir()) if (path / "molora.json").is_file()]
        variants = {path.name: load(path).router for path in folders}
    default = _default_name(model, variants)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in test.single.items())
    report = {
        **heading(
            command,
            f"test split by sha256 of the task or document id (10%): {len(test.mixed)} mixed conversations, {counts}",
        ),
        "unseen_forms": test.unseen_forms(model),
        "example": test.example(model),
    }
    top_k, weights = model.stack[LAYER].top_k, str(model.router.weights)
    kinds = sorted((("unit", 1), ("softmax", 2)), key=lambda kind: kind != (weights, top_k))
    for name in sorted(variants, key=lambda name: name != default):  # the default first, so that no stop loses it
        for weights, top_k in kinds:
            with routed_by(model, variants[name], top_k, weights):
                label = _label(name, weights, top_k)
                contenders.append(test.measure(label, "router", {LAYER: "auto"}, positions=True))
                print(f"{label}: mixed {contenders[-1].mixed.mean:.4f}", flush=True)
            first = next(one.name for one in contenders if one.kind == "router")
            report |= {"default": first, "rows": _rows(contenders), "must": _must(contenders, first)}
            write_report(report, out)
    return report


def _label(name: str, weights: str, top_k: int) -> str:
    return f"MoLoRA {name}, top-{top_k} {weights}"


class _Test:
    """The held-out data, and one model that wears every contender's adapters and router."""

    def __init__(self, model: MoLoRAModel, domains: Sequence[str], data: Path, limit: int, batch_tokens: int) -> None:
        self.model, self.domains, self.batch_tokens = model, list(domains), batch_tokens
        some = slice(limit or None)
        examples = {name: read_examples(data / f"{name}.test.jsonl") for name in domains}
        self.mixed_examples = mix(examples, "test", MIXED)[some]
        self.single_examples = {name: rows[some] for name, rows in examples.items()}
        self.mixed = self._encode(self.mixed_examples)
        self.single = {name: self._encode(rows) for name, rows in self.single_examples.items()}

    def _encode(self, rows: Sequence[Any]) -> list[Encoded]:
        return encode_within(rows, self.model.tokenizer, 2048, self.domains)

    def measure(
        self, name: str, kind: str, choice: dict[str, Any], before: Any = None, positions: bool = False
    ) -> Contender:
        def of(rows: Sequence[Encoded]) -> Losses:
            return losses(self.model, rows, {**OFF, **choice}, len(self.domains), before, self.batch_tokens)

        found = Contender(name, kind, of(self.mixed), {domain: of(rows) for domain, rows in self.single.items()})
        if positions:
            found.positions = right_by_position(self.model, self.mixed, self.domains, self.batch_tokens)
        return found

    def baselines(self) -> list[Contender]:
        contenders = [self.measure("base", "base", {LAYER: None})]
        contenders += [self.measure(f"{name} alone", "adapter", {LAYER: name}) for name in self.domains]
        oracle = LabelRouter(self.model, self.domains)
        with routed_by(self.model, oracle):
            contenders.append(self.measure("label oracle", "oracle", {LAYER: "auto"}, oracle.see))
        merge = LabelRouter(self.model, self.domains, share=True)
        with routed_by(self.model, merge, top_k=len(self.domains)):
            contenders.append(self.measure("uniform merge", "merge", {LAYER: "auto"}, merge.see))
        singles = [contender for contender in contenders if contender.kind == "adapter"]
        contenders.append(
            Contender(
                "per-sequence oracle",
                "sequence-oracle",
                best_by_sequence([single.mixed for single in singles]),
                {name: best_by_sequence([single.single[name] for single in singles]) for name in self.domains},
            )
        )
        for contender in contenders:
            print(f"{contender.name}: mixed {contender.mixed.mean:.4f}", flush=True)
        return contenders

    def unseen_forms(self, model: MoLoRAModel) -> dict[str, dict[str, float]]:
        """Single-domain loss of the default router and of the own adapter, by seen and unseen prompt forms."""
        found: dict[str, dict[str, float]] = {}
        for domain, examples in self.single_examples.items():
            for unseen in (False, True):
                rows = self._encode([example for example in examples if example.unseen == unseen])
                for who, choice in (("router", "auto"), ("own adapter", domain)):
                    value = losses(model, rows, {**OFF, LAYER: choice}, len(self.domains), None, self.batch_tokens)
                    found.setdefault(domain, {})[f"{who}, {'unseen' if unseen else 'seen'} forms"] = value.mean
        return found

    @torch.no_grad()
    def example(self, model: MoLoRAModel) -> dict[str, Any]:
        """Routes and router probabilities of one mixed conversation, for the picture."""
        wanted = [row for row in self.mixed if 250 < row.input_ids.numel() < 500 and len(row.domain_ids.unique()) > 2]
        row = (wanted or self.mixed)[0]
        ids = row.input_ids[None].to(model.device)
        routes = model(ids, selection={**OFF, LAYER: "auto"}, output_routes=True, use_cache=False).routes
        assert routes is not None and routes.logits[-1] is not None
        own = [routes.rows.index(f"{LAYER}/{name}") for name in (*self.domains, "none")]
        p = routes.logits[-1][0][:, own].softmax(-1)
        return {
            "tokens": [model.tokenizer.decode([token]) for token in row.input_ids.tolist()],
            "domains": self.domains,
            "labels": row.domain_ids.tolist(),
            "answer": (row.labels != -100).tolist(),
            "probabilities": [[round(value, 4) for value in line] for line in p.tolist()],
        }


def _rows(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    base, oracle = _named(contenders, "base").mixed, _named(contenders, "label oracle").mixed

    def share(index: torch.Tensor, x: Losses) -> torch.Tensor:
        loss = {key: value.loss.sum(1)[index].sum(-1) for key, value in (("b", base), ("o", oracle), ("x", x))}
        return (loss["b"] - loss["x"]) / (loss["b"] - loss["o"])

    rows = []
    for one in contenders:
        everything = torch.arange(len(base.loss))[None]
        low, high = bootstrap(partial(share, x=one.mixed), len(base.loss))
        gap = (base.domain_mean - one.mixed.domain_mean) / (base.domain_mean - oracle.domain_mean)
        rows.append(
            {
                "contender": one.name,
                "kind": one.kind,
                "mixed": one.mixed.mean,
                "mixed_domain_mean": one.mixed.domain_mean,
                "gap_closed": float(share(everything, one.mixed)),
                "gap_closed_interval": [low, high],
                "gap_closed_domain_mean": gap,
                "single": {name: value.mean for name, value in one.single.items()},
                "right_by_position": one.positions,
            }
        )
    return rows


def _must(contenders: Sequence[Contender], default: str) -> list[dict[str, Any]]:
    """The lines that the main result has to reach, for the shipped default."""
    chosen = _named(contenders, default)
    row = next(row for row in _rows([*contenders]) if row["contender"] == default)

    def margin(other: str) -> tuple[float, list[float]]:
        mine, theirs = chosen.mixed, _named(contenders, other).mixed

        def difference(index: torch.Tensor) -> torch.Tensor:
            loss = theirs.loss.sum(1)[index].sum(-1) - mine.loss.sum(1)[index].sum(-1)
            return loss / mine.tokens.sum(1).double()[index].sum(-1)

        value = float(difference(torch.arange(len(mine.loss))[None]))
        return value, list(bootstrap(difference, len(mine.loss)))

    lines = [line("share of the gap to the label oracle closed on mixed text", row["gap_closed"], 0.95, "higher",
                   f"95% interval {_span(row['gap_closed_interval'])}")]  # fmt: skip
    for other, bar in (("per-sequence oracle", 0.15), ("uniform merge", 0.2)):
        value, interval = margin(other)
        note = f"nats a token, 95% interval {_span(interval)}"
        lines.append(line(f"below the {other} on mixed text", value, bar, "higher", note))
        lines[-1]["holds"] = lines[-1]["holds"] and interval[0] > 0
    for domain, mine in chosen.single.items():
        own = _named(contenders, f"{domain} alone").single[domain]
        value = mine.mean - own.mean
        name = f"single-domain {domain}: loss above its own adapter's"
        lines.append(line(name, value, SINGLE_TOLERANCE, "lower", "nats a token"))
    assert chosen.positions is not None
    right = chosen.positions[f"answer {'17+'}"]
    lines.append(line("answer tokens past the 16th that go to the right domain", right, 0.95, "higher", ""))
    return lines


def _span(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _named(contenders: Sequence[Contender], name: str) -> Contender:
    return next(contender for contender in contenders if contender.name == name)


def _default_name(model: MoLoRAModel, variants: dict[str, Any]) -> str:
    """Which variant is the shipped router: the one with the same weights."""
    assert isinstance(model.router, Router)
    own = {name: tensor.cpu() for name, tensor in model.router.state_dict().items()}
    for name, router in variants.items():
        other = router.state_dict()
        if own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own):
            return name
    raise ValueError("The shipped router is none of the variants.")
