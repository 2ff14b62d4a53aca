"""The next token of each of many sequences: the settings of one touch no other."""

from typing import Any

import pytest
import torch

from molora.serve.requests import Sampling
from molora.serve.sampling import Sampler, choose

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(3)) * 4


def sampler(prompt: list[int] | None = None, **settings: Any) -> Sampler:
    return Sampler.of(Sampling(**settings), prompt or [7, 8], torch.device("cpu"))


def test_the_coldest_is_the_likeliest() -> None:
    for temperature in (0, 1e-300, 1e-40, 1e-5, 1e-4):
        found = choose(LOGITS, [sampler(temperature=temperature) for _ in range(3)])
        assert [one.token for one in found] == LOGITS.argmax(-1).tolist(), temperature


@pytest.mark.parametrize(
    ("logits", "settings"),
    [
        ({5: float("nan")}, {"temperature": 1.0}),
        ({5: float("inf")}, {"temperature": 1.0}),
        ({5: 3e38}, {"temperature": 1.0, "repetition_penalty": 0.01}),
        ({5: 3e38}, {"temperature": 0, "repetition_penalty": 0.01}),
        (dict.fromkeys(range(50), -float("inf")), {"temperature": 1.0}),
    ],
)
def test_what_is_no_number_is_of_one_sequence(logits: dict[int, float], settings: dict[str, Any]) -> None:
    bad = LOGITS.clone()
    for token, value in logits.items():
        bad[1, token] = value
    found = choose(bad, [sampler(temperature=0), sampler([5], **settings), sampler(seed=1)])
    alone = choose(LOGITS[2:], [sampler(seed=1)])
    assert [one.token for one in found] == [int(LOGITS[0].argmax()), -1, alone[0].token]


def test_large_numbers_are_numbers() -> None:
    huge = LOGITS.clone()
    huge[1, 5], huge[1, 6] = 3e38, -3e38
    settings = {"temperature": 1e-4, "top_p": 0.9, "min_p": 0.1, "top_k": 9}
    assert [one.token for one in choose(huge, [sampler(**settings) for _ in range(3)])] == huge.argmax(-1).tolist()


def test_penalties_and_biases_are_openais() -> None:
    one = sampler(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0, 9: -1.0, 10**8: 5.0})
    for token in (3, 3, 4):
        row = torch.full((1, 50), -90.0)
        row[0, token] = 90.0
        assert choose(row, [one])[0].token == token
    wanted = LOGITS[0].clone()
    wanted[3] += 2.0 - (0.5 + 2 * 0.25)
    wanted[4] -= 0.5 + 0.25
    wanted[9] -= 1.0
    assert torch.allclose(one.changed(LOGITS[0]), wanted)


def test_a_repetition_is_one_of_the_prompt_or_the_answer() -> None:
    one = sampler([7, 7], temperature=0, repetition_penalty=2.0)
    one.counts[8] = 3
    wanted = LOGITS[0].clone()
    for token in (7, 8):  # each once, however often it was said
        wanted[token] = wanted[token] / 2 if wanted[token] > 0 else wanted[token] * 2
    assert torch.allclose(one.changed(LOGITS[0]), wanted)


def test_draws_are_of_ones_own_settings_and_chance() -> None:
    """Whatever is drawn beside it, and in which place."""
    cold = {"temperature": 0.3, "top_k": 3}
    alone = [choose(LOGITS[:1], [sampler(seed=seed, **cold)])[0].token for seed in range(40)]
    three = LOGITS[:1].expand(3, -1)
    beside = [
        choose(three, [sampler(seed=99), sampler(seed=seed, **cold), sampler(temperature=0)]) for seed in range(40)
    ]
    assert [found[1].token for found in beside] == alone
    assert len(set(alone)) > 1 and set(alone) <= set(LOGITS[0].topk(3).indices.tolist())


def test_logprobs_are_the_models_own_before_any_setting() -> None:
    [found] = choose(LOGITS[:1], [sampler(temperature=0, logprobs=2, logit_bias={5: 100.0}, repetition_penalty=2.0)])
    own = LOGITS[0].log_softmax(-1)
    assert found.token == 5 and found.logprob == pytest.approx(float(own[5]))
    assert [token for token, _ in found.likeliest] == own.topk(2).indices.tolist()
