"""Settings of the adapter trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from molora.base import DEFAULT_BASE
from molora.errors import ConfigError
from molora_training.settings import work_folder


@dataclass(frozen=True)
class DataFiles:
    """What to learn from: JSON Lines of conversations. `source` and `licence` go into the model card."""

    train: Path
    validation: Path
    max_length: int = 1024  # tokens; longer examples are left out
    source: str = "not stated"
    licence: str = "not stated"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2 tokens, not {self.max_length}.")


@dataclass(frozen=True)
class LoraShape:
    """The adapter. `targets` is PEFT's: "all-linear" or module names.

    start_dropout: at how many of a question's tokens at most, from 1, the adapter does not act at the start of every
    other example: a router has read little there, and may leave them to the base (its `null_start`) or be wrong.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    start_dropout: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"lora.rank and lora.alpha must be positive, not {self.rank} and {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in [0, 1), not {self.dropout}.")
        if self.start_dropout < 0:
            raise ConfigError(f"lora.start_dropout must not be negative, not {self.start_dropout}.")


@dataclass(frozen=True)
class AdapterTrainSettings:
    """One training. A step has up to `batch_tokens` padded tokens, over all processes.

    start: a PEFT adapter of that base to go on from, whose rank, alpha and targets then are what `lora` says.
    stack: a saved MoLoRA for that base, whose adapters and router act, as they do when nothing is selected, while the
    new one is trained on top of them.
    """

    out: Path
    data: DataFiles
    lora: LoraShape = field(default_factory=LoraShape)
    base: str = DEFAULT_BASE
    start: Path | None = None
    stack: Path | None = None
    learning_rate: float = 2e-4
    warmup: float = 0.05  # share of the steps
    epochs: int = 3
    max_steps: int | None = None
    batch_tokens: int = 4096
    checkpoint_every: int = 100  # steps between two validations, each with a checkpoint
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the frozen base; the adapter trains in float32

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_tokens", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be positive or null, not {self.max_steps}.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must lie in [0, 1), not {self.warmup}.")
        if self.start is not None and self.stack is not None:
            raise ConfigError("An adapter on top of a stack begins anew: leave out start, or stack.")

    @property
    def work(self) -> Path:
        """Where checkpoints and curves of this training lie."""
        return work_folder("adapter", self.out)
