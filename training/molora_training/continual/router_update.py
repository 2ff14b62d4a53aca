"""A new version of a router after adapters came or went, or for new text, which serves only if it still finds the old.

The router that serves is trained on for a short while on the data that is there, mixed as a router's training is.
Before and after, held-out text says which share of each domain's tokens goes to its own adapter, and how many go
elsewhere than before.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from molora import MoLoRAModel, Router
from molora.errors import ConfigError, VersionError
from molora.saved import load
from molora.stack import AUTO
from molora.versions import Versions
from molora_training import router
from molora_training.data import Encoded, Example, encode_within, mix, read_examples
from molora_training.evaluate import batches
from molora_training.router_settings import RouterTrainSettings, learnt_null_start

PROBED = 24  # held-out conversations of each domain
PROBED_MIXED = 60
_UNLABELLED = -2


@dataclass(frozen=True)
class RouterUpdateSettings:
    """One update of a router.

    Args:
        model: a saved MoLoRA with a learned router.
        data: prepared data of its adapters, or of some: `<adapter>.train.jsonl` and `.validation.jsonl`.
        max_forgetting: how many of a domain's tokens, as a share of all of them, may be found less than before.
        mixed, documents, in_a_turn, asides: texts of several domains in the training.
    """

    model: Path
    data: Path
    max_forgetting: float = 0.02
    mixed: int = 300
    documents: int = 200
    in_a_turn: int = 200
    asides: int = 100
    epochs: int = 1
    learning_rate: float = 1e-3
    batch_tokens: int = 4096
    max_length: int = 2048
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if self.max_forgetting < 0:
            raise ConfigError("max_forgetting must not be negative.")


@dataclass(frozen=True)
class RouterUpdated:
    """What came of it.

    right: of each domain the share of held-out tokens that go to its adapter, before and after. mixed: the same of text
    that changes its domain. drift: the share of all those tokens that go elsewhere than before.
    """

    version: int
    parent: int | None
    promoted: bool
    why: str
    right: dict[str, tuple[float, float]]
    mixed: tuple[float, float]
    drift: float
    seconds: float


def update_router(settings: RouterUpdateSettings, command: str | None = None) -> RouterUpdated:
    """Trains, measures, keeps the new version, and lets it serve if it passed.

    Raises:
        VersionError: the saved MoLoRA has no learned router, or an update of it is running.
        DataError: no data of its adapters, or it does not fit them.
    """
    started = time.monotonic()
    versions = Versions(settings.model)
    if not isinstance(load(settings.model).router, Router):
        raise VersionError(f"{settings.model} has no learned router to go on from: `molora train router` makes one.")
    place = settings.model / versions.place
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / ".update.lock", timeout=0):
            return _update(settings, command, versions, started)
    except Timeout:
        raise VersionError("Another update of the router is running.") from None


def _update(settings: RouterUpdateSettings, command: str | None, versions: Versions, started: float) -> RouterUpdated:
    with tempfile.TemporaryDirectory() as scratch:
        training = RouterTrainSettings(
            model=settings.model, out=Path(scratch) / "trained", data=settings.data, start="saved",
            mixed=settings.mixed, documents=settings.documents, in_a_turn=settings.in_a_turn, asides=settings.asides,
            epochs=settings.epochs, learning_rate=settings.learning_rate, batch_tokens=settings.batch_tokens,
            max_length=settings.max_length, seed=settings.seed, dtype=settings.dtype,
            null_start=learnt_null_start(settings.model),
        )  # fmt: skip
        metrics = router.train(training, resume=False, command=command)
        shutil.rmtree(training.work, ignore_errors=True)
        new = load(training.out).router
    assert isinstance(new, Router)
    probe = _Probe(settings, metrics["domains"])
    before = probe.choices()
    probe.model.set_router(new)
    after = probe.choices()
    right = {name: (probe.right(before, name), probe.right(after, name)) for name in probe.domains}
    mixed = probe.right(before, None), probe.right(after, None)
    drift = float((before != after).float().mean())
    why = _against(settings, right, mixed)
    version = versions.add(
        new.cpu(),
        command=command,
        data={"domains": metrics["domains"], "conversations": metrics["train_conversations"]},
        metrics={"right": right, "mixed": mixed, "drift": drift, "steps": metrics["steps"]},
        passed=not why,
        why=why or f"{mixed[1] - mixed[0]:+.1%} of the tokens of mixed text go right",
    )
    if not why:
        versions.promote(version.number)
    return RouterUpdated(
        version.number, version.parent, not why, version.why, right, mixed, drift, round(time.monotonic() - started, 1)
    )


def _against(settings: RouterUpdateSettings, right: dict[str, tuple[float, float]], mixed: tuple[float, float]) -> str:
    """Why the new version may not serve; nothing if it may."""
    for name, (before, after) in right.items():
        if before - after > settings.max_forgetting:
            most = settings.max_forgetting
            return f"{before - after:.1%} of the tokens of {name} are found no more, which may be {most:.1%} at most"
    gained = sum(after - before for before, after in right.values())
    return "" if gained > 0 or mixed[1] > mixed[0] else "nothing was gained"


class _Probe:
    """Held-out text, and where its tokens go."""

    def __init__(self, settings: RouterUpdateSettings, domains: Sequence[str]) -> None:
        dtype = getattr(torch, settings.dtype)
        self.model = MoLoRAModel.from_pretrained(settings.model, dtype=dtype)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.batch_tokens = settings.batch_tokens
        # A layer that is off unless it is named is a choice of the person.
        self.layers = [layer.name for layer in self.model.stack.layers if layer.default == AUTO and not layer.shared]
        self.domains = [name for name in domains if any(name in self.model.stack[one].adapters for one in self.layers)]
        files = {name: settings.data / f"{name}.validation.jsonl" for name in self.domains}
        rows: dict[str, Sequence[Example]] = {name: read_examples(file) for name, file in files.items()}
        few: list[Any] = [one for some in rows.values() for one in some[:PROBED]]
        self.single = len(few)
        if len(rows) > 1:
            few += mix(rows, "validation", PROBED_MIXED)
        self.rows: list[Encoded] = []
        self.of: list[str | None] = []
        for row in few:
            for encoded in encode_within([row], self.model.tokenizer, settings.max_length, self.domains):
                self.rows.append(encoded)
                self.of.append(row.domain if isinstance(row, Example) else None)
        self.labels = torch.cat([row.domain_ids for row in self.rows])
        self.owner = torch.cat(
            [torch.full((len(row.domain_ids),), -1 if of is None else self.domains.index(of)) for row, of in
             zip(self.rows, self.of, strict=True)]
        )  # fmt: skip

    @torch.no_grad()
    def choices(self) -> torch.Tensor:
        """For each token of the probe the place among the domains of the adapter it goes to; -2 for none of them."""
        selection = {layer.name: AUTO if layer.name in self.layers else None for layer in self.model.stack.layers}
        place = {f"{layer}/{name}": index for layer in self.layers for index, name in enumerate(self.domains)}
        found: list[torch.Tensor] = [torch.empty(0)] * len(self.rows)
        for indices, batch in batches(self.model, self.rows, self.batch_tokens):
            routes = self.model(
                batch.input_ids, batch.attention_mask, selection=selection, output_routes=True, use_cache=False,
                logits_to_keep=1,
            ).routes  # fmt: skip
            assert routes is not None
            to = torch.tensor([place.get(name, _UNLABELLED) for name in routes.names] + [_UNLABELLED])
            own = [routes.columns.index(layer) for layer in self.layers]
            chosen = to[routes.slots[..., own].cpu()].amax(-1)  # a domain's adapter is in one layer
            for index, row in zip(indices, chosen, strict=True):
                found[index] = row[: len(self.rows[index].input_ids)]
        return torch.cat(found)

    def right(self, choices: torch.Tensor, domain: str | None) -> float:
        """The share of the tokens of a domain alone, or of mixed text, that go to their own domain."""
        these = self.owner == (-1 if domain is None else self.domains.index(domain))
        return float((choices == self.labels)[these].float().mean()) if bool(these.any()) else 0.0
