"""What the benchmark times computes the same function, each contender against float64."""

import pytest
import torch

from benchmarks.contenders import CONTENDERS, exact, make_problem
from tests.conftest import DEVICE


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("popularity", ["uniform", "identical"])
@pytest.mark.parametrize("S", [1, 2])
def test_every_contender_is_the_exact_sum(name: str, popularity: str, S: int) -> None:
    problem = make_problem(9, 64, (48, 16), 4, S, 8, popularity, torch.float32, str(DEVICE))
    expected = exact(problem)
    assert (expected - problem.y).norm() > 0.1 * expected.norm()
    found = CONTENDERS[name](problem)()
    assert (found - expected).norm() <= 1e-5 * expected.norm()
