"""What the benchmark times computes the same function, each contender against float64."""

from pathlib import Path

import pytest
import torch

from benchmarks.contenders import CONTENDERS, Problem, exact, make_problem
from benchmarks.kernels import check, limit_us, save
from benchmarks.results import read
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


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_prepared_contender_adds_at_each_call(name: str) -> None:
    problem = make_problem(5, 32, (16,), 3, 1, 16, "zipf", torch.float32, str(DEVICE))
    once = exact(problem) - problem.y.double()
    twice = problem.y.double() + 2 * once
    run = CONTENDERS[name](problem)
    run()
    assert (run() - twice).norm() <= 1e-5 * twice.norm()


def test_a_wrong_contender_is_not_timed() -> None:
    problem = make_problem(5, 32, (16,), 3, 1, 16, "uniform", torch.float32, str(DEVICE))
    before = problem.y.clone()

    def nothing(p: Problem):
        return lambda: p.y

    with pytest.raises(SystemExit, match="nothing is wrong"):
        check("nothing", problem, nothing)
    check("dense", problem, CONTENDERS["dense"])
    assert torch.equal(problem.y, before)


def test_the_limit_counts_the_adapters_that_act() -> None:
    same, spread = (
        limit_us(make_problem(8, 32, (16, 16), 4, 1, 16, popularity, torch.float32, str(DEVICE)))
        for popularity in ("identical", "uniform")
    )
    assert same < spread


def test_a_row_that_was_saved_is_read_as_it_was(tmp_path: Path) -> None:
    row = {"shape": "tiny", "adapters": 4, "popularity": "zipf", "base": 1.5, "dense": float("nan"), "device": "A GPU"}
    save(tmp_path / "kernels.csv", [row, row])
    found = read(tmp_path / "kernels.csv")
    assert found["device"] == "A GPU"
    plain = {"shape": "tiny", "adapters": 4, "popularity": "zipf", "base": 1.5, "dense": None}
    assert found["rows"] == [plain, plain]
