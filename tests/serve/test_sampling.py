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
