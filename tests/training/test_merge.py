"""Merged adapters: what PEFT makes of them, that the base stays as it was, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch

from molora.adapter import Adapter
from molora.errors import ConfigError
from molora_training.merge import merge
from tests.conftest import make_base, write_adapter


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(make_base(), folder / name, seed) for seed, name in enumerate(("math", "code"))}


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    modules = Adapter.load(folder).modules
    return {name: (of.B.double() @ of.A.double()) * of.scale for name, of in modules.items()}


def test_cat_is_the_weighted_sum(two: dict[str, Path], tmp_path: Path) -> None:
    base = make_base()
    before = copy.deepcopy(base.state_dict())
    found = deltas(merge(base, two, tmp_path / "merged", "cat", weights=[0.3, 0.7]))
    one, other = (deltas(folder) for folder in two.values())
    for name, delta in found.items():
        expected = 0.3 * one[name] + 0.7 * other[name]
        assert (delta - expected).norm() < 1e-5 * expected.norm()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "magnitude_prune", "ties_svd"])
def test_pruning_merges_follow_their_seed(method: str, two: dict[str, Path], tmp_path: Path) -> None:
    made = [
        deltas(merge(make_base(), two, tmp_path / str(index), method, density=0.3, seed=seed))  # type: ignore[arg-type]
        for index, seed in enumerate((0, 0, 1))
    ]
    name = next(iter(made[0]))
    assert torch.isfinite(made[0][name]).all() and made[0][name].abs().max() > 0
    assert torch.equal(made[0][name], made[1][name])
    assert torch.equal(made[0][name], made[2][name]) == (not method.startswith("dare"))


def test_what_does_not_fit_is_refused(two: dict[str, Path], tmp_path: Path) -> None:
    base, wide = make_base(), write_adapter(make_base(), tmp_path / "wide", 5, r=8)
    with pytest.raises(ConfigError, match="no merge 'sum'"):
        merge(base, two, tmp_path / "out", "sum")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="two adapters or more"):
        merge(base, {"math": two["math"]}, tmp_path / "out")
    with pytest.raises(ConfigError, match="as many weights"):
        merge(base, two, tmp_path / "out", weights=[1.0])
    with pytest.raises(ConfigError, match=r"one rank \(math has 4, wide has 8\).*ties_svd"):
        merge(base, {"math": two["math"], "wide": wide}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(base, {"math": two["math"], "wide": wide}, tmp_path / "out", "ties_svd")
    assert Adapter.load(tmp_path / "out").ranks == [8]
