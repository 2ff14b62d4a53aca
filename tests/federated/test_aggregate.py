"""What the server makes of clients' factors, beside numpy's dense products and singular values in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from molora.adapter import Adapter
from molora.errors import ConfigError, UpdateError
from molora_training.federated.aggregate import DeltaSum, mean_of_factors, shares
from molora_training.federated.changes import beside
from molora_training.federated.lora import Lora, distance, factor_distance, read_bytes
from tests.conftest import make_base, write_adapter

SIZES = {"tall": (40, 12), "wide": (9, 33), "square": (16, 16)}  # out, in


def factors(rank: int, seed: int, scale: float = 2.0, sizes: dict[str, tuple[int, int]] = SIZES) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    return Lora(
        {
            name: (torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator))
            for name, (rows, width) in sizes.items()
        },
        scale,
    )


def dense(one: Lora, name: str) -> np.ndarray:
    a, b = (tensor.double().numpy() for tensor in one.pairs[name])
    return one.scale * b @ a


CLIENTS = [(factors(4, 1), 0.5), (factors(1, 2), 0.125), (factors(7, 3), 0.25), (factors(2, 4, scale=0.5), 0.125)]


def summed(name: str, clients: list[tuple[Lora, float]] = CLIENTS) -> np.ndarray:
    return sum(weight * dense(one, name) for one, weight in clients)


def total(clients: list[tuple[Lora, float]] = CLIENTS) -> DeltaSum:
    found = DeltaSum()
    for one, weight in clients:
        found.add(one, weight)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_stacking_is_exact(name: str) -> None:
    exact = total().exact()
    assert np.allclose(dense(exact, name), summed(name), rtol=0, atol=1e-5)
    assert len(exact.pairs[name][0]) == min(sum(one.rank for one, _ in CLIENTS), *SIZES[name])


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("name", SIZES)
def test_the_cut_is_the_nearest_of_its_rank(name: str, rank: int) -> None:
    u, s, vh = np.linalg.svd(summed(name))
    cut = total().cut(rank, scale=2.0)
    assert np.allclose(dense(cut, name), u[:, :rank] * s[:rank] @ vh[:rank], rtol=0, atol=1e-4)
    a, b = (tensor.double().numpy() for tensor in cut.pairs[name])
    assert np.allclose(a @ a.T, np.eye(rank), atol=1e-5)  # A = V^T
    assert np.allclose(np.linalg.norm(b, axis=0), s[:rank] / 2.0, rtol=1e-5)  # B = U S / (alpha / r)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_clients_slice_is_the_cut_of_its_rank(rank: int) -> None:
    cut = total().cut(8, 2.0)
    for name in SIZES:
        assert np.allclose(dense(cut.slice(rank), name), dense(total().cut(rank, 2.0), name), atol=1e-5)


def test_many_clients_take_no_more_memory_than_the_module() -> None:
    many = [(factors(16, seed), 1 / 64) for seed in range(64)]
    found = total(many)
    for name, (rows, width) in SIZES.items():
        assert found.dense[name].shape == (rows, width) and name not in found.stacked
        assert np.allclose(dense(found.exact(), name), summed(name, many), atol=1e-4)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_dense_sum_is_cut_as_numpy_says(rank: int) -> None:
    many = [(factors(6, seed), 0.9**seed) for seed in range(30)]
    cut = total(many).cut(rank, 2.0)
    for name in SIZES:
        u, s, vh = np.linalg.svd(summed(name, many))
        assert np.allclose(dense(cut, name), u[:, :rank] * s[:rank] @ vh[:rank], rtol=0, atol=1e-4)
        a = cut.pairs[name][0].double().numpy()
        assert np.allclose(a @ a.T, np.eye(rank), atol=1e-5)


def test_what_adds_up_to_nothing_is_nothing() -> None:
    for one in (factors(3, 1), factors(9, 2)):  # as factors, and where they outgrow the module
        cut = total([(one, 1.0), (one, -1.0), (one, 0.0)]).cut(4, 2.0)
        for name in SIZES:
            a, _ = cut.pairs[name]
            assert np.abs(dense(cut, name)).max() < 1e-5 and bool((a.norm(dim=1) > 0).all())


def test_the_order_of_clients_does_not_matter() -> None:
    one, other = total().cut(4, 2.0), total(CLIENTS[::-1]).cut(4, 2.0)
    assert distance(one, other) < 1e-4 * distance(one, Lora({n: (a * 0, b) for n, (a, b) in one.pairs.items()}, 2.0))


def test_ranks_that_the_sum_lacks_can_still_learn() -> None:
    cut = total([(factors(2, 1), 1.0)]).cut(6, 2.0)
    for name in SIZES:
        a, b = cut.pairs[name]
        assert torch.equal(b[:, 2:], torch.zeros_like(b[:, 2:])) and bool((a[2:].norm(dim=1) > 0).all())
        assert np.allclose(dense(cut, name), dense(factors(2, 1), name), atol=1e-5)


def test_what_can_still_learn_is_drawn_for_each_module_and_seed() -> None:
    one = factors(1, 1, sizes={"q": (8, 16), "v": (8, 16)})
    drawn = [total([(one, 1.0)]).cut(5, 2.0, seed).pairs[name][0][1:] for seed in (3, 4) for name in ("q", "v")]
    for place, rows in enumerate(drawn):
        assert 0.5 / 16**0.5 < float(rows.abs().max()) <= 1 / 16**0.5  # kaiming_uniform_ with a = sqrt(5)
        assert not any(torch.equal(rows, other) for other in drawn[:place])
    assert torch.equal(total([(one, 1.0)]).cut(5, 2.0, 3).pairs["q"][0][1:], drawn[0])


def test_ranks_that_nobody_of_a_round_has_stay() -> None:
    before, mean = factors(5, 1), factors(2, 2)
    for name, (a, b) in beside(mean, before).pairs.items():
        assert torch.equal(a[:2], mean.pairs[name][0]) and torch.equal(a[2:], before.pairs[name][0][2:])
        assert torch.equal(b[:, :2], mean.pairs[name][1]) and torch.equal(b[:, 2:], before.pairs[name][1][:, 2:])


def test_the_mean_of_factors_has_cross_terms() -> None:
    clients = [(factors(3, 1), 0.5), (factors(3, 2), 0.5)]
    naive = mean_of_factors(clients)
    for name in SIZES:
        a = [dense_factor(one, name, 0) for one, _ in clients]
        b = [dense_factor(one, name, 1) for one, _ in clients]
        assert np.allclose(dense(naive, name), 2.0 * (b[0] + b[1]) @ (a[0] + a[1]) / 4, atol=1e-5)
        assert not np.allclose(dense(naive, name), summed(name, clients), atol=0.1)


def dense_factor(one: Lora, name: str, which: int) -> np.ndarray:
    return one.pairs[name][which].double().numpy()


def test_the_mean_of_different_ranks_is_filled_with_zeros() -> None:
    naive = mean_of_factors([(factors(1, 1), 0.5), (factors(3, 2), 0.5)])
    for name in SIZES:
        a, b = naive.pairs[name]
        assert len(a) == 3 and torch.allclose(a[1:], factors(3, 2).pairs[name][0][1:] / 2)
        assert torch.allclose(b[:, 1:], factors(3, 2).pairs[name][1][:, 1:] / 2)


def test_no_updates_have_no_mean() -> None:
    with pytest.raises(ConfigError, match="no update"):
        mean_of_factors([])
    with pytest.raises(ConfigError, match="different scales"):
        mean_of_factors([(factors(2, 1, 1.0), 0.5), (factors(2, 1, 2.0), 0.5)])


def test_shares_are_by_examples() -> None:
    assert shares({"ada": 30, "bob": 10}) == {"ada": 0.75, "bob": 0.25}


@pytest.mark.parametrize("ranks", [(2, 2), (1, 5)])
def test_the_distance_is_that_of_dense_deltas(ranks: tuple[int, int]) -> None:
    one, other = factors(ranks[0], 1), factors(ranks[1], 2, scale=0.7)
    expected = sum(float(np.square(dense(one, name) - dense(other, name)).sum()) for name in SIZES) ** 0.5
    assert distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert distance(one, one) == pytest.approx(0, abs=1e-5)


def test_the_distance_of_factors_is_that_of_their_entries() -> None:
    one, other = factors(3, 1), factors(3, 2, scale=0.7)
    pairs = [(dense_factor(one, name, k), dense_factor(other, name, k)) for name in SIZES for k in range(2)]
    expected = sum(float(np.square(x - y).sum()) for x, y in pairs) ** 0.5
    assert factor_distance(one, other) == pytest.approx(expected, rel=1e-9) and factor_distance(one, one) == 0


def test_bytes_come_back_as_they_were() -> None:
    tensors, about, scale = read_bytes(factors(3, 1).to_bytes({"round": 4, "client": "ada"}))
    assert about == {"round": 4, "client": "ada"} and scale == 2.0
    back = Lora.from_tensors(tensors, scale)
    assert all(torch.equal(x, y) for n in SIZES for x, y in zip(back.pairs[n], factors(3, 1).pairs[n], strict=True))


def test_modules_are_in_the_order_of_their_names(adapters: dict[str, Path]) -> None:
    """safetensors gives them in another one each time, and what is drawn is drawn for a place."""
    names = [f"layers.{number}" for number in range(12)]
    message = factors(2, 1, sizes=dict.fromkeys(reversed(names), (3, 4))).to_bytes({})
    assert list(Lora.from_tensors(*read_bytes(message)[::2]).pairs) == sorted(names)
    assert list(Lora.from_folder(adapters["math"]).pairs) == sorted(Adapter.load(adapters["math"]).modules)


@pytest.mark.parametrize("message", [b"", b"\x80\x04pickle", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_safetensors_is_refused(message: bytes) -> None:
    with pytest.raises(UpdateError, match="no safetensors"):
        read_bytes(message)


def test_a_folder_is_one_that_peft_reads(adapters: dict[str, Path], tmp_path: Path) -> None:
    read = Lora.from_folder(adapters["math"])
    config = json.loads((adapters["math"] / "adapter_config.json").read_text())
    read.slice(2).save(tmp_path / "two", config)
    model = PeftModel.from_pretrained(make_base(), tmp_path / "two")
    name, (a, b) = next(iter(read.pairs.items()))
    module = model.base_model.model.get_submodule(name)
    assert module.scaling["default"] == read.scale == 2.0
    assert torch.equal(module.lora_A["default"].weight, a[:2])
    assert torch.equal(module.lora_B["default"].weight, b[:, :2])


def test_rslora_is_written_as_the_scale_that_it_has(tmp_path: Path) -> None:
    place = write_adapter(make_base(), tmp_path / "root", 1, r=4, lora_alpha=8, use_rslora=True)
    read = Lora.from_folder(place)
    read.slice(2).save(tmp_path / "two", json.loads((place / "adapter_config.json").read_text()))
    assert read.scale == 4 and {one.scale for one in Adapter.load(tmp_path / "two").modules.values()} == {4}


def test_a_stack_has_the_ranks_that_each_module_needs(adapters: dict[str, Path], tmp_path: Path) -> None:
    read = Lora.from_folder(adapters["math"])
    found = DeltaSum()
    for times in range(10):
        found.add(read, 0.1 * times)
    config = json.loads((adapters["math"] / "adapter_config.json").read_text())
    found.exact().save(tmp_path / "stack", config)
    model = PeftModel.from_pretrained(make_base(), tmp_path / "stack")
    ranks = set()
    for name, (a, b) in read.pairs.items():
        module = model.base_model.model.get_submodule(name)
        ranks.add(module.r["default"])
        assert torch.allclose(module.get_delta_weight("default"), 4.5 * read.scale * b @ a, atol=1e-4)
    assert ranks == {16, 32}
