"""What the engine is asked and what it answers: requests, how they are sampled, and the pieces that come back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from molora.errors import RequestError
from molora.selection import Selection

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]
Route: TypeAlias = tuple[tuple[str, str | None, float], ...]
"""Of a token the layer, the adapter or None, and its weight, for each that may act."""
MOST_LOGPROBS = 20
MOST_BIASES = 1024  # tokens of logit_bias: they are laid on in every step, for which all others wait


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen; the names and meanings are those of OpenAI's API and ``transformers``.

    Raises:
        RequestError: a value is out of its range.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None  # None: as many as the engine's longest sequence has room for
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many of the likeliest tokens are told beside the chosen one

    def __post_init__(self) -> None:
        within = {
            "temperature": (self.temperature, 0, 2),
            "top_p": (self.top_p, 0, 1),
            "min_p": (self.min_p, 0, 1),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "repetition_penalty": (self.repetition_penalty, 0.01, 10),
            "top_k": (self.top_k, 0, math.inf),
            "max_tokens": (self.max_tokens or 1, 1, math.inf),
            "logprobs": (self.logprobs or 0, 0, MOST_LOGPROBS),
        }
        for name, (value, least, most) in within.items():
            if not least <= value <= most:  # NaN is in no range
                raise RequestError(f"{name} must be from {least} to {most}, not {value}.")
        if self.top_p == 0 or self.max_tokens == 0:
            raise RequestError("top_p and max_tokens must be above 0.")
        if len(self.stop) > 16 or not all(self.stop):
            raise RequestError("stop takes up to 16 texts, none of them empty.")
        if len(self.logit_bias) > MOST_BIASES or not all(-100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise RequestError(f"logit_bias takes up to {MOST_BIASES} tokens, each from -100 to 100.")


@dataclass(frozen=True)
class Request:
    """A sequence to be continued.

    ids: the prompt's tokens. selection: as in :meth:`molora.MoLoRAModel.forward`, for this sequence. user: whose turn
    it is: waiting requests are served in turn by user. timeout_s: seconds from submission until it is given up. routes:
    whether each piece tells which adapters acted. ends: False: no token ends it before it has max_tokens.
    """

    ids: Sequence[int]
    selection: Selection | None = None
    sampling: Sampling = Sampling()
    user: str = ""
    timeout_s: float | None = None
    routes: bool = False
    ends: bool = True


@dataclass(frozen=True)
class Piece:
    """One generated token: ``text`` is what is new since the last piece (empty while a character is incomplete)."""

    token: int
    text: str
    logprob: float | None = None  # nats
    likeliest: tuple[tuple[int, float], ...] = ()  # tokens and their logprobs
    route: Route = ()


@dataclass(frozen=True)
class Finished:
    """The last thing that is heard of a request. ``text``: what was held back as the possible start of a stop text."""

    reason: FinishReason
    prompt_tokens: int
    tokens: int
    text: str = ""
    error: Exception | None = None


Event: TypeAlias = Piece | Finished
