"""How routing scales with the number of adapters: each router on text of all its domains, and on that of the fewest."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.errors import ConfigError
from molora.saved import ROUTER_METRICS
from molora_training.data import IGNORED, Encoded, encode_within, mix, read_examples
from molora_training.evaluate import (
    LAYER,
    LabelRouter,
    batches,
    bootstrap,
    chosen_domains,
    gap_closed,
    losses,
    routed_by,
)
from molora_training.quality_sets import COUNT, MAX_TOKENS
from molora_training.report import heading, write_report


def run(routers: Path, data: Path, out: Path, command: str, limit: int = 0, batch_tokens: int = 8192) -> dict[str, Any]:
    """Measures and writes ``out``.

    Args:
        routers: folder of saved MoLoRAs, each with the adapters of the next smaller one and more.
        data: prepared data of all domains.
        out: the report.
        command: to be named in it.
        limit: only so many conversations of each set (0: all).
        batch_tokens: padded tokens in one forward.

    Raises:
        ConfigError: no saved MoLoRA with a learned router is there, or one lacks an adapter of a smaller one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = [path for path in sorted(routers.iterdir()) if (path / "molora.json").is_file()]
    models = [MoLoRAModel.from_pretrained(path, dtype=torch.bfloat16).to(device) for path in folders]
    found = sorted(zip(folders, models, strict=True), key=lambda pair: len(pair[1].stack[LAYER].adapters))
    if not found or not all(isinstance(model.router, Router) for model in models):
        raise ConfigError(f"{routers} must hold saved MoLoRAs with learned routers, and nothing else that is saved.")
    fewest = list(found[0][1].stack[LAYER].adapters)
    rows = []
    for folder, model in found:
        if lacking := set(fewest) - set(model.stack[LAYER].adapters):
            raise ConfigError(f"{folder} lacks the adapter {min(lacking)} of {found[0][0]}.")
        rows.append(_row(folder, model, fewest, data, limit, batch_tokens))
        print(f"{rows[-1]['adapters']} adapters: {rows[-1]}", flush=True)
    report = {
        **heading(command, f"test split by sha256 of the task or document id; {limit or COUNT} conversations a set"),
        "fewest": fewest,
        "rows": rows,
    }
    write_report(report, out)
    return report


def _row(
    folder: Path, model: MoLoRAModel, fewest: Sequence[str], data: Path, limit: int, batch_tokens: int
) -> dict[str, Any]:
    domains = list(model.stack[LAYER].adapters)
    metrics = json.loads((folder / ROUTER_METRICS).read_text(encoding="utf-8"))
    own, shared = (_text(model, names, domains, data, limit) for names in (domains, fewest))
    return {
        "adapters": len(domains),
        "parameters": metrics["parameters"],
        "seconds": metrics["seconds"],
        "machine": metrics["machine"],
        "own": _losses(model, own, domains, batch_tokens),
        "shared": _losses(model, shared, domains, batch_tokens),
        **_right(model, own, domains, batch_tokens),
    }


def _text(model: MoLoRAModel, names: Sequence[str], domains: Sequence[str], data: Path, limit: int) -> list[Encoded]:
    """Conversations that change their domain, of the domains ``names``."""
    test = {name: read_examples(data / f"{name}.test.jsonl") for name in names}
    return encode_within(mix(test, "test", COUNT)[: limit or None], model.tokenizer, MAX_TOKENS, domains)


def _losses(model: MoLoRAModel, rows: Sequence[Encoded], domains: Sequence[str], batch_tokens: int) -> dict[str, Any]:
    """Nats an answer token of the base, the label oracle and the router, and the share of the gap that it closes."""
    oracle = LabelRouter(model, domains)
    measure = partial(losses, model, rows, domains=len(domains), batch_tokens=batch_tokens)
    base, router = (measure({LAYER: choice}) for choice in (None, "auto"))
    with routed_by(model, oracle):
        best = measure({LAYER: "auto"}, before=oracle.see)
    share = partial(gap_closed, base=base, oracle=best, own=router)
    return {
        "base": base.mean,
        "oracle": best.mean,
        "router": router.mean,
        "gap_closed": float(share(torch.arange(len(rows))[None])),
        "gap_closed_interval": list(bootstrap(share, len(rows))),
    }


def _right(model: MoLoRAModel, rows: Sequence[Encoded], domains: Sequence[str], batch_tokens: int) -> dict[str, float]:
    """Shares of answer tokens that go to their own domain, and to one of its family (named alike up to the first
    dash)."""
    families = [name.partition("-")[0] for name in domains]
    family = torch.tensor([families.index(name) for name in families] + [-2, -1], device=model.device)  # of -2, of -1
    own = near = count = 0
    for _, batch in batches(model, rows, batch_tokens):
        chosen = chosen_domains(model, batch, {LAYER: "auto"}, domains)
        answers = batch.labels != IGNORED
        own += int((chosen == batch.domain_ids)[answers].sum())
        near += int((family[chosen] == family[batch.domain_ids])[answers].sum())
        count += int(answers.sum())
    return {"right": own / count, "right_family": near / count}
