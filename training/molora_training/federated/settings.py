"""What a federated training is told: one YAML file for the server; each client gets its part with an order."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from molora.base import DEFAULT_BASE
from molora.errors import ConfigError

Aggregate = Literal["flexlora", "changes", "stack", "factors", "shared"]
SCALE = 2.0  # alpha over rank of an adapter that begins here


@dataclass(frozen=True)
class LocalSettings:
    """What a client does in a round.

    Args:
        method: backprop, or forward: by directional derivatives alone (FwdLLM, arXiv 2308.13894).
        examples: of its conversations that it learns from, drawn anew each round.
        batch_tokens: padded tokens of a step.
        max_length: tokens; longer conversations are left out.
        judged: of the conversations that it holds out, how many tell its loss at most.
    """

    method: Literal["backprop", "forward"] = "backprop"
    examples: int = 8
    epochs: int = 1
    learning_rate: float = 1e-3
    batch_tokens: int = 512
    max_length: int = 256
    judged: int = 16

    def __post_init__(self) -> None:
        counts = self.examples, self.epochs, self.batch_tokens, self.max_length, self.judged
        if min(counts) < 1 or not 0 < self.learning_rate < inf:
            raise ConfigError("The settings under local must be positive.")


@dataclass(frozen=True)
class LimitSettings:
    """What the server puts up with.

    Args:
        seconds: after which a round ends with those who have answered.
        fewest: updates of which a round makes anything; with fewer it is tried again, up to three times.
        max_norm: times the median of the round that a client's adapter may change.
        max_forgetting: how much the loss on general conversations may grow, as a share.
    """

    seconds: float = 600.0
    fewest: int = 2
    max_norm: float = 10.0
    max_forgetting: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.seconds < inf or self.fewest < 1 or not self.max_norm >= 1:
            raise ConfigError("limits: seconds must be positive, fewest and max_norm 1 or more.")


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy for each client as a whole (DP-FTRL, arXiv 2103.00039), and sums that hide their summands.

    Args:
        epsilon: what the whole training may cost; None: no noise.
        delta: the chance with which that may fail.
        clip: the largest L2 norm of what a client changes in a round.
        cohorts: parts of the clients, of which one learns in a round; after all had their turn the tree begins anew.
        secure: the server gets sums only, by SecAgg+ (IACR ePrint 2020/704).
    """

    epsilon: float | None = None
    delta: float = 1e-5
    clip: float = 1.0
    cohorts: int = 1
    secure: bool = False

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < self.epsilon < inf:
            raise ConfigError("privacy.epsilon must be positive, and none for no noise.")
        if not 0 < self.delta < 1 or not 0 < self.clip < inf or self.cohorts < 1:
            raise ConfigError("privacy: delta lies between 0 and 1, clip and cohorts are positive.")

    @property
    def sums_only(self) -> bool:
        """Whether all that is used of the updates is their sum."""
        return self.secure or self.epsilon is not None


@dataclass(frozen=True)
class FederateSettings:
    """One federated training.

    Args:
        data: of a simulation, a folder with `<client>.jsonl`, or `<client>.train.jsonl` of `molora train data`.
        clients: names in it; none: all that are there, in the order of their names.
        out: the PEFT folder that comes out; the state of the rounds lies beside it.
        start: an adapter to go on from; None: one for all linear modules that does nothing yet.
        router: a saved MoLoRA whose router is to get a row for the adapter, as a new one has by `--into`.
        ranks: of the clients, in turn; the server's is the largest.
        rounds: each of them with all clients, or with a cohort.
        aggregate: how updates become one adapter.
            flexlora: the sum of deltas, cut to the server's rank (FlexLoRA, arXiv 2402.11505).
            changes: what each client changed of its slice is added to what was there, and cut.
            stack: the sum of deltas as it is, ranks beside each other, under new factors (FLoRA, arXiv 2409.05976).
            factors: the mean of A and of B, the naive form.
            shared: A stays as it began, and the mean of B is the mean of deltas (FFA-LoRA, arXiv 2403.12313).
    """

    data: Path = Path("data")
    clients: tuple[str, ...] = ()
    out: Path = Path("runs/federated/adapter")
    base: str = DEFAULT_BASE
    start: Path | None = None
    router: Path | None = None
    ranks: tuple[int, ...] = (8,)
    rounds: int = 10
    aggregate: Aggregate = "flexlora"
    local: LocalSettings = field(default_factory=LocalSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ConfigError("ranks must be one or more positive numbers.")
        if self.rounds < 1:
            raise ConfigError("rounds must be 1 or more.")
        if self.privacy.sums_only and self.aggregate != "shared":
            raise ConfigError(
                "privacy.secure and privacy.epsilon leave the server nothing but sums, and sums of A and of B make no "
                "sum of deltas: they need aggregate: shared."
            )
        if self.router is not None and self.privacy.epsilon is not None:
            raise ConfigError(
                "The router needs a row for the new adapter, of what the clients' text is like on average, and the "
                "noise of privacy.epsilon does not cover that: begin the adapter by `molora update --new`, or leave "
                "privacy.epsilon out."
            )

    @property
    def rank(self) -> int:
        """Of the server's adapter."""
        return max(self.ranks)
