"""Settings of the router trainer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from molora import RouterConfig
from molora.errors import ConfigError
from molora.saved import ROUTER_METRICS
from molora_training.data import data_dir
from molora_training.settings import work_folder

BEST = RouterConfig(reads=(0, 4), hidden=512)  # of what docs/results.md compares, on a base of 30 layers


@dataclass(frozen=True)
class LossWeights:
    """loss = lm * next token + label * cross-entropy to the domain + distil * cross-entropy to the adapters that write
    the next token best + balance * balance + z * z + entropy * entropy."""

    lm: float = 0.0
    label: float = 1.0
    distil: float = 0.0
    balance: float = 0.0
    z: float = 1e-4
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if min(self.lm, self.label, self.distil, self.balance, self.z, self.entropy) < 0:
            raise ConfigError("Loss weights must not be negative.")
        if self.lm == self.label == self.distil == 0:
            raise ConfigError("loss.lm, loss.label and loss.distil are all 0: there is nothing to learn from.")


@dataclass(frozen=True)
class RouterTrainSettings:
    """One training of a router for the adapters of ``model``, which stay frozen.

    Args:
        model: a saved MoLoRA, or a stack.yaml.
        out: where the saved MoLoRA with the trained router goes (may be ``model``).
        data: folder of prepared data, by default MoLoRA's own: ``<domain>.train.jsonl`` and ``.validation.jsonl`` for
            each adapter that the router shall choose, named like the adapter; ``general`` holds text for which none is
            right.
        base: of a stack.yaml; a saved MoLoRA names its own.
        start: "new", or "saved": go on from the router that ``model`` has.
        router: of a new one.
        mixed: how many conversations that change their domain at each turn to train on, beside the single ones.
        documents, in_a_turn: how many documents of several domains' problems, and turns that ask two questions.
        asides: how many questions beside a sentence of another domain, which asks for nothing.
        both: how many questions of each kind that need two adapters at once (`molora train data both`).
        null_start: how many tokens at the start of a text none is right for: of adapters with `start_dropout`. None: as
            many as the saved router has learnt, of a new one 0.
        epochs: passes over so many texts; each one mixes them anew.
        batch_tokens: padded tokens of a step, over all processes.
    """

    model: Path
    out: Path
    data: Path = field(default_factory=data_dir)
    base: str | None = None
    start: Literal["new", "saved"] = "new"
    router: RouterConfig = field(default_factory=lambda: BEST)
    loss: LossWeights = field(default_factory=LossWeights)
    mixed: int = 3000
    documents: int = 2000
    in_a_turn: int = 2000
    asides: int = 2000
    both: int = 0
    null_start: int | None = None
    max_length: int = 1024
    epochs: int = 3
    max_steps: int | None = None
    batch_tokens: int = 8192
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    checkpoint_every: int = 200
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("mixed", "max_length", "epochs", "batch_tokens", "learning_rate", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        if min(self.documents, self.in_a_turn, self.asides, self.both, self.null_start or 0) < 0:
            raise ConfigError("documents, in_a_turn, asides, both and null_start must not be negative.")

    @property
    def starts(self) -> int:
        """``null_start``, or that of the saved router."""
        if self.null_start is not None:
            return self.null_start
        return learnt_null_start(self.model) if self.start == "saved" else 0

    @property
    def work(self) -> Path:
        """Where checkpoints and curves of this training lie."""
        return work_folder("router", self.out)


def learnt_null_start(folder: Path) -> int:
    """The ``null_start`` with which a saved router was trained; 0 if it does not say."""
    file = folder / ROUTER_METRICS
    if not file.is_file():
        return 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["settings"]
    return int(found.get("null_start") or 0)
