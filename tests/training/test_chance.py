"""How often chance gives a gain: against all ways counted one by one."""

import itertools
import random

import pytest
import torch

from molora_training.continual.chance import DRAWS, EXACT, by_chance


def counted(gains: list[int]) -> float:
    """Of all ways to sign the gains those that come to as much; whole numbers, so that ties are ties."""
    ways = list(itertools.product((1, -1), repeat=len(gains)))
    as_much = [sum(s * g for s, g in zip(signs, gains, strict=True)) >= sum(gains) for signs in ways]
    return sum(as_much) / len(ways)


@pytest.mark.parametrize("count", range(1, EXACT + 1))
@pytest.mark.parametrize("lift", [-3, 0, 3, 10])
def test_few_are_counted(count: int, lift: int) -> None:
    chance = random.Random(count)
    gains = [chance.randint(-9, 9) + lift for _ in range(count)]
    assert by_chance(torch.tensor(gains)) == counted(gains)
    assert by_chance(torch.tensor(gains).double() * 1e-7 / 3) == counted(gains)  # ties outlast rounding


@pytest.mark.parametrize("lift", [-1, 2, 5])
def test_more_are_drawn(lift: int) -> None:
    chance = random.Random(lift)
    gains = [chance.randint(-9, 9) + lift for _ in range(EXACT + 2)]
    found, wanted = by_chance(torch.tensor(gains)), counted(gains)
    assert found == by_chance(torch.tensor(gains)) != by_chance(torch.tensor(gains), seed=1)
    assert found == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / DRAWS) ** 0.5 + 1 / DRAWS)


def test_the_ends() -> None:
    assert by_chance(torch.zeros(6)) == by_chance(torch.tensor([float("nan"), 1.0])) == 1.0
    assert by_chance(torch.ones(5)) == 1 / 32
    many = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert by_chance(many) == 1 / (DRAWS + 1) and by_chance(-many) == 1.0


def test_without_a_gain_chance_is_told_as_it_is() -> None:
    drawn = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails
    few = sum(by_chance(gains) <= 0.05 for gains in drawn)
    assert 30 < few < 50 + 4 * 7
