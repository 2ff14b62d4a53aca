"""The next token of each of many sequences, each by its own settings; the processors are those of ``transformers``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from molora.serve.requests import Sampling

_LEAST_TEMPERATURE = 1e-4
"""Below it the likeliest token is all that has a chance, and logits divided by it are no numbers in the end."""


@dataclass
class Chosen:
    """A token, its logprob by the model itself (nats), and the likeliest tokens with theirs.

    token: -1 where there is none: the logits are no finite numbers.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """One sequence's settings and what they need to know of it."""

    sampling: Sampling
    prompt: Sequence[int]
    chance: torch.Generator | None = None
    counts: dict[int, int] = field(default_factory=dict)  # of the tokens that were generated

    @classmethod
    def of(cls, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> "Sampler":
        chance = None
        if sampling.seed is not None:
            chance = torch.Generator(device).manual_seed(sampling.seed % 2**63)
        return cls(sampling, prompt, chance)

    def changed(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits [vocabulary] with penalties and biases."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0:
            ids = torch.tensor([[*self.prompt, *self.counts]], device=scores.device)
            scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores[None])[0]
        more: dict[int, float] = dict(sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self.counts.items():
                penalty = sampling.presence_penalty + count * sampling.frequency_penalty
                more[token] = more.get(token, 0.0) - penalty
        more = {token: change for token, change in more.items() if 0 <= token < len(scores)}
        if not more:
            return scores
        tokens = torch.tensor(list(more), device=scores.device)
        changes = torch.tensor(list(more.values()), device=scores.device, dtype=scores.dtype)
        return scores.index_add(0, tokens, changes)

    @property
    def draws(self) -> bool:
        """Whether it may be another token than the likeliest."""
        return self.sampling.temperature >= _LEAST_TEMPERATURE

    @property
    def needs_scores(self) -> bool:
        """Whether the likeliest token is not all that is asked for."""
        return self.draws or self.sampling.logprobs is not None or self.changes

    @property
    def changes(self) -> bool:
        one = self.sampling
        return one.repetition_penalty != 1.0 or bool(one.presence_penalty or one.frequency_penalty or one.logit_bias)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Chosen]:
    """The next token of each of N sequences.

    Args:
        logits: [N, vocabulary].
        samplers: of each; they take the tokens in.
    """
    best, tokens = logits.max(-1)
    sound = best.isfinite()  # of what holds a NaN the largest is one
    if any(one.needs_scores for one in samplers):
        # On a GPU a draw from what holds a NaN would end more than this sequence.
        raw = scores = logits.float().masked_fill(~sound.unsqueeze(-1), 0.0)
    if any(one.changes for one in samplers):
        scores = torch.stack([one.changed(row) for one, row in zip(samplers, raw, strict=True)])
        best, tokens = scores.max(-1)
        sound = sound & best.isfinite()
        scores = scores.masked_fill(~sound.unsqueeze(-1), 0.0)
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for row, one in enumerate(samplers):
        if one.draws:
            how = one.sampling
            groups.setdefault((how.temperature, how.top_k, how.top_p, how.min_p), []).append(row)
    for how_all, rows in groups.items():
        here = scores if len(rows) == len(scores) else scores[rows]
        here = here - here.max(-1, keepdim=True).values  # or one divided by the temperature might be infinite
        shares = _warpers(*how_all)(None, here).softmax(-1)  # warpers read no ids
        for place, row in enumerate(rows):
            tokens[row] = torch.multinomial(shares[place], 1, generator=samplers[row].chance)[0]
    chosen = [Chosen(token) for token in torch.where(sound, tokens, -1).tolist()]
    for row, (one, found) in enumerate(zip(samplers, chosen, strict=True)):
        one.counts[found.token] = one.counts.get(found.token, 0) + 1
        if one.sampling.logprobs is not None:
            _tell(found, raw[row].log_softmax(-1), one.sampling.logprobs)
    return chosen


def _tell(found: Chosen, logprobs: torch.Tensor, count: int) -> None:
    found.logprob = float(logprobs[found.token])
    if count:
        best = logprobs.topk(count)
        found.likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@lru_cache(maxsize=256)
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        found.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        found.append(MinPLogitsWarper(min_p))
    return found
