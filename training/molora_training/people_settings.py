"""What the table of people compares."""

from dataclasses import dataclass
from pathlib import Path

from molora.errors import ConfigError


@dataclass(frozen=True)
class PeopleSettings:
    """What is compared.

    Args:
        people: a set of `molora train people`; those held out are asked.
        pool: of pieces, on top of ``task`` if that is given.
        net: makes adapters of profiles, for the base alone.
        task: an adapter of what the task is for everybody, trained on others.
        data: prepared data, with the set and what is called ``general``.
        general: a domain that has nothing to do with the set.
        limit: people; 0: all. questions: of each, at most.
        found: interactions that a search puts into the prompt.
        learning_rates: of a person's own adapter; the best on validation is taken. fit_learning_rates: of weights of
            pieces, likewise.
        epochs, batch_tokens: of own adapters, as weights of pieces have them. at_once: people in a step; fewer where
            each has more tokens in it.
        new_tokens: of an answer. batch: prompts at once.
    """

    people: str
    pool: Path | None = None
    net: Path | None = None
    task: Path | None = None
    data: Path | None = None
    general: str = "science"
    limit: int = 0
    questions: int = 25
    found: int = 3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    fit_learning_rates: tuple[float, ...] = (0.05, 0.15, 0.4)
    epochs: int = 4
    batch_tokens: int = 512
    at_once: int = 8
    new_tokens: int = 64
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("questions", "found", "epochs", "batch_tokens", "at_once", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number from 1, not {getattr(self, name)}.")
        for name in ("learning_rates", "fit_learning_rates"):
            if not getattr(self, name):
                raise ConfigError(f"{name} names none.")
