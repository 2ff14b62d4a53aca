"""What dp-accounting makes of the noise: known values, and that a training's promise is kept."""

import math

import pytest

from molora.errors import ConfigError
from molora_training.federated.accounting import epsilon, noise_multiplier
from molora_training.federated.private import Private
from molora_training.federated.settings import PrivacySettings
from tests.federated.test_privacy import lora


def by_hand(multiplier: float, delta: float, levels: int, count: int) -> float:
    """RDP of `count` trees of which a client is in `levels` nodes each: alpha levels count / 2 z^2, converted by
    proposition 12 of arXiv 2004.00010, at the best of many orders."""
    best = math.inf
    for tenth in range(11, 5000):
        alpha = tenth / 10
        rdp = alpha * levels * count / (2 * multiplier**2)
        found = rdp + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)
        best = min(best, found)
    return best


@pytest.mark.parametrize(
    ("multiplier", "rounds", "cohorts", "levels", "count"), [(3.0, 8, 4, 3, 2), (5.0, 10, 1, 1, 10), (2.0, 8, 8, 4, 1)]
)
def test_the_accountant_says_what_the_paper_does(
    multiplier: float, rounds: int, cohorts: int, levels: int, count: int
) -> None:
    """A client is in one node of each level of a tree (arXiv 2103.00039)."""
    found = epsilon(multiplier, 1e-5, rounds, cohorts)
    assert found == pytest.approx(by_hand(multiplier, 1e-5, levels, count), rel=0.02)


@pytest.mark.parametrize("wanted", [1.0, 8.0])
def test_the_noise_is_the_least_that_is_enough(wanted: float) -> None:
    found = noise_multiplier(wanted, 1e-5, 10, 4)
    assert epsilon(found, 1e-5, 10, 4) <= wanted < epsilon(0.995 * found, 1e-5, 10, 4)


def test_cohorts_cost_less_than_all_in_every_round() -> None:
    assert noise_multiplier(8.0, 1e-5, 16, 16) < noise_multiplier(8.0, 1e-5, 16, 4) < noise_multiplier(8.0, 1e-5, 16, 1)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="takes noise of over"):
        noise_multiplier(1e-6, 1e-9, 1000, 1)


def test_a_training_reports_what_it_promises() -> None:
    own = Private.begin(PrivacySettings(epsilon=8.0, clip=0.5, cohorts=4), 10, lora())
    told = own.report()
    assert told["epsilon"] <= 8.0 and told["epsilon"] == pytest.approx(8.0, rel=0.01) and told["delta"] == 1e-5
    assert own.noise_tree.std == told["noise_multiplier"] * 0.5 and len(told["assumptions"]) == 4
