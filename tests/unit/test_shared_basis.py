"""Many adapters in the room of few: the fit against dense float64, the groups, the store on disk, the command."""

import copy
import gc
import hashlib
import json
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from molora.adapter import WEIGHTS_FILE, Adapter
from molora.commands.compress import compress as command
from molora.compose import store as store_module
from molora.compose.cluster import group, sketch
from molora.compose.joint import Basis, fit, halves, residual
from molora.compose.store import CompressedStore, compress
from molora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    DataError,
    NonFiniteError,
    StackError,
)
from molora.factors import Factors, of_adapter, write_factors

OUT, IN = 40, 30
MODULES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}  # the tiny base's
Q = next(iter(MODULES))
Pair = tuple[Tensor, Tensor]


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def related(
    seed: int, count: int, out: int = OUT, inner: int = IN, size: int = 6, rank: int = 4, noise: float = 0
) -> list[Pair]:
    """Of one basis of ``size``, the norms far apart; ``noise`` is a share of each."""
    generator = torch.Generator().manual_seed(seed)
    U, V = orthonormal(out, size, generator), orthonormal(inner, size, generator)
    found = []
    for number in range(count):
        A, B = torch.randn(rank, size, generator=generator) @ V.T, U @ torch.randn(size, rank, generator=generator)
        A = A + noise * A.norm() * torch.randn(A.shape, generator=generator) / A.numel() ** 0.5
        B = B + noise * B.norm() * torch.randn(B.shape, generator=generator) / B.numel() ** 0.5
        found.append((A, B * 10.0 ** (number % 3)))
    return found


def unrelated(seed: int, count: int, rank: int = 3) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)) for _ in range(count)
    ]


def errors(basis: Basis, pairs: list[Pair]) -> list[float]:
    return [residual(basis, core(basis, A, B), A, B) for A, B in pairs]


def core(basis: Basis, A: Tensor, B: Tensor) -> Tensor:
    a, b = halves(basis, A, B)
    return b @ a


def objective(basis: Basis, pairs: list[Pair]) -> float:
    return sum(error**2 for error in errors(basis, pairs))


def dense(pairs: list[Pair]) -> list[Tensor]:
    """Of norm 1, float64."""
    deltas = [B.double() @ A.double() for A, B in pairs]
    return [delta / delta.norm() for delta in deltas]


def dense_fit(pairs: list[Pair], size: int, rounds: int) -> float:
    """The objective after so many rounds, by whole deltas."""
    deltas = dense(pairs)
    _, _, right = torch.linalg.svd(torch.cat(deltas))
    V = right[:size].T
    for _ in range(rounds):
        U = torch.linalg.svd(torch.cat([delta @ V for delta in deltas], 1))[0][:, :size]
        V = torch.linalg.svd(torch.cat([delta.T @ U for delta in deltas], 1))[0][:, :size]
    return float(sum((delta - U @ (U.T @ delta @ V) @ V.T).square().sum() for delta in deltas))


@pytest.mark.parametrize(
    ("pairs", "size", "columns"),
    [
        pytest.param(related(0, 9), 6, 6, id="as many directions as they share"),
        pytest.param(related(1, 9), 20, 6, id="no more than they need"),
        pytest.param(unrelated(2, 5), 15, 15, id="unrelated, the sum of their ranks"),
        pytest.param(unrelated(3, 20), 64, IN, id="more than there are inputs"),
        pytest.param(unrelated(4, 1, 2), 2, 2, id="one adapter"),
    ],
)
def test_what_fits_the_basis_is_kept(pairs: list[Pair], size: int, columns: int) -> None:
    basis = fit(lambda: pairs, size)
    assert basis.V.shape == (IN, columns) and basis.U.shape[1] in (columns, OUT)
    for matrix in (basis.U, basis.V):
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(matrix.shape[1]), rtol=0, atol=1e-5)
    for A, B in pairs:
        S = core(basis, A, B)
        torch.testing.assert_close(basis.U @ S @ basis.V.T, B @ A, rtol=0, atol=1e-5 * float((B @ A).norm()))
    assert max(errors(basis, pairs)) < 1e-5


def test_more_rounds_are_never_worse_and_are_those_of_dense_matrices() -> None:
    pairs = [(A, B * 10.0 ** (number % 3)) for number, (A, B) in enumerate(unrelated(0, 12))]
    found = [objective(fit(lambda: pairs, 8, rounds, tolerance=0), pairs) for rounds in range(1, 9)]
    assert all(after <= before + 1e-6 for before, after in pairwise(found))
    assert found[-1] < found[0]
    for rounds, value in enumerate(found, 1):
        assert value == pytest.approx(dense_fit(pairs, 8, rounds), rel=1e-5)
    gains = [(before - after) / len(pairs) for before, after in pairwise(found)]  # of rounds 2, 3, ...
    for rounds, tolerance in ((2, 1.0), (4, (gains[1] + gains[2]) / 2)):
        wanted, stopped = fit(lambda: pairs, 8, rounds, tolerance=0), fit(lambda: pairs, 8, 9, tolerance)
        assert torch.equal(stopped.U, wanted.U) and torch.equal(stopped.V, wanted.V)


@pytest.mark.parametrize(("noise", "over"), [(0.1, 1e-3), (0.5, 0.01)])
def test_what_is_beyond_the_span_is_hardly_missed(noise: float, over: float) -> None:
    """In a module of more sides than are looked at, where there is a tail of directions."""
    pairs = related(5, 40, out=160, inner=200, size=24, rank=6, noise=noise)
    wanted = dense_fit(pairs, 12, 10)
    assert objective(fit(lambda: pairs, 12, 10, tolerance=0), pairs) == pytest.approx(wanted, rel=over)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_too_few_directions_are_better_than_those_of_each_side_alone(size: int) -> None:
    pairs = related(3, 12, size=12, rank=6, noise=0.1)
    deltas = dense(pairs)
    V = torch.linalg.svd(torch.cat(deltas))[2][:size].T
    U = torch.linalg.svd(torch.cat(deltas, 1))[0][:, :size]
    one_side = float(sum((delta - delta @ V @ V.T).square().sum() for delta in deltas))
    both_alone = float(sum((delta - U @ U.T @ delta @ V @ V.T).square().sum() for delta in deltas))
    found = objective(fit(lambda: pairs, size), pairs)
    assert one_side - 1e-6 <= found <= both_alone + 1e-6  # the one side keeps [out, c] of each: it is the bound
    assert found < both_alone - 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_is_that_of_dense_matrices(dtype: torch.dtype) -> None:
    pairs = unrelated(1, 6)
    made = fit(lambda: pairs, 7)
    basis = Basis(made.U.to(dtype).float(), made.V.to(dtype).float())
    for A, B in pairs:
        S = core(basis, A, B).to(dtype)
        delta = B.double() @ A.double()
        wanted = float((delta - basis.U.double() @ S.double() @ basis.V.double().T).norm() / delta.norm())
        assert residual(basis, S, A, B) == pytest.approx(wanted, rel=1e-7)
        assert residual(made, core(made, A, B) * 1.1, A, B) > residual(made, core(made, A, B), A, B)
    zero = (A, torch.zeros_like(B))
    assert residual(basis, core(basis, *zero), *zero) == 0.0
    assert not core(basis, *zero).any()


def test_deltas_that_are_nothing_do_not_count() -> None:
    pairs = related(0, 4)
    A, B = unrelated(9, 1)[0]
    nothing: list[Pair] = [(A, torch.zeros_like(B)), (torch.cat([A, A / 3]), torch.cat([B, -3 * B], 1))]
    basis = fit(lambda: [*pairs, *nothing], 6)
    assert max(errors(basis, [*pairs, *nothing])) < 1e-5
    assert fit(lambda: nothing, 6).U.shape == (OUT, 1)


def test_one_adapter_is_in_memory_at_a_time() -> None:
    pairs, alive, most, calls = unrelated(0, 40), 0, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def stream() -> Iterator[Pair]:
        nonlocal alive, most, calls
        calls += 1
        for A, B in pairs:
            mine = A.clone()
            weakref.finalize(mine, gone)
            alive += 1
            most = max(most, alive)
            yield mine, B
            del mine

    basis = fit(stream, 5, rounds=3, tolerance=0)
    gc.collect()
    assert most <= 3 and alive == 0 and calls == 3  # the last of the loop, and the one that comes
    assert torch.equal(basis.U, fit(lambda: pairs, 5, rounds=3, tolerance=0).U)


def test_settings_of_a_fit() -> None:
    for size, rounds in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            fit(lambda: unrelated(0, 2), size, rounds)
    with pytest.raises(DataError, match="at least one"):
        fit(lambda: [], 4)


def signatures(seed: int, modules: int = 3) -> Tensor:
    """Two families of 10 each, taking turns."""
    parts = []
    for module in range(modules):
        pairs = zip(related(module, 10, noise=0.1), related(100 + module, 10, noise=0.1), strict=True)
        parts.append(sketch(f"m{module}", [pair for two in pairs for pair in two], seed))
    return torch.cat(parts, 1)


def test_families_are_groups() -> None:
    for seed in range(5):
        assert group(signatures(seed), 2, seed) == [0, 1] * 10
    assert torch.equal(signatures(3), signatures(3)) and not torch.equal(signatures(3), signatures(4))
    assert group(signatures(0), 5, 7) == group(signatures(0), 5, 7)
    assert group(signatures(0), 1) == [0] * 20
    assert sorted(group(signatures(0), 20)) == list(range(20))


def test_signatures() -> None:
    A, B = unrelated(0, 1)[0]
    found = sketch("m", [None, (A, B), (-3 * A, B), (A, 0 * B)])
    assert not found[0].any() and not found[3].any()
    assert float(found[1].norm()) == pytest.approx(1)
    torch.testing.assert_close(found[1], found[2])  # neither sign nor norm


def test_groups_that_would_be_empty_are_none() -> None:
    same = torch.ones(6, 4)
    assert group(same, 3) == [0] * 6
    assert group(torch.cat([same, -same]), 5) == [0] * 6 + [1] * 6
    for count in (0, 7):
        with pytest.raises(ConfigError, match="1 to 6"):
            group(same, count)


def family(
    root: Path, seed: int, count: int, start: str = "a", base: str = "some/base", **kind: Any
) -> dict[str, Path]:
    """Related adapters on disk, in float32."""
    by_module = {
        module: related(seed + place, count, *sizes, **kind) for place, (module, sizes) in enumerate(MODULES.items())
    }
    found = {}
    for number in range(count):
        name = f"{start}{number}"
        factors = {module: pairs[number] for module, pairs in by_module.items()}
        write_factors(root / name, factors, base, dtype=torch.float32)
        found[name] = root / name
    return found


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def products(factors: Factors) -> dict[str, Tensor]:
    return {name: B.double() @ A.double() for name, (A, B) in factors.items()}


def far(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of all modules together; what ``found`` lacks is lost."""
    gone = sum(float((delta - found.get(name, 0)).square().sum()) for name, delta in wanted.items())
    return float((gone / sum(float(delta.square().sum()) for delta in wanted.values())) ** 0.5)


def source_products(path: Path) -> dict[str, Tensor]:
    return products(of_adapter(Adapter.load(path)))


@pytest.mark.parametrize(
    ("dtype", "basis", "about"), [(torch.float32, 6, 1e-6), (torch.bfloat16, 6, 0.005), (torch.bfloat16, 4, 0.7)]
)
def test_a_store_gives_back_what_it_says(tmp_path: Path, dtype: torch.dtype, basis: int, about: float) -> None:
    sources = family(tmp_path, 0, 8)
    steps: list[tuple[str, int, int]] = []
    report = compress(
        sources, tmp_path / "store", basis=basis, most_error=1, dtype=dtype,
        on_step=lambda what, done, total: steps.append((what, done, total)),
    )  # fmt: skip
    store = CompressedStore.load(tmp_path / "store")
    assert store.names == list(sources) and store.raw == [] and report.clusters == 1
    for name, path in sources.items():
        found = store.factors(name)
        assert far(products(found), source_products(path)) == pytest.approx(store.error(name), rel=1e-3, abs=1e-6)
        assert store.error(name) == report.errors[name] <= about
        assert all(A.dtype == B.dtype == torch.float32 and len(A) == min(basis, 4) for A, B in found.values())
    shared = [store.adapter(name).modules[Q].basis for name in store.names]
    assert all(one is shared[0] for one in shared)  # they are there once
    assert report.bytes == store.bytes() and report.bytes["raw"] == 0
    assert report.bytes["raw_bytes"] == sum(
        (path / file).stat().st_size for path in sources.values() for file in (WEIGHTS_FILE, "adapter_config.json")
    )
    assert report.total_bytes == sum(file.stat().st_size for file in (tmp_path / "store").rglob("*.*s*"))
    assert report.share < 0.7 and report.worst_error == max(report.errors.values())
    assert [step for step in steps if step[1] == step[2]] == [("read", 8, 8), ("bases", 2, 2), ("adapters", 8, 8)]
    about_store = json.loads((tmp_path / "store" / "store.json").read_text())
    assert about_store["clusters"][0][Q] == {"U": [32, basis], "V": [32, basis]}
    sha256 = hashlib.sha256((sources["a0"] / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert about_store["adapters"]["a0"]["sha256"] == sha256 and about_store["base"] == "some/base"


@pytest.mark.parametrize(("rank", "kept"), [(4, 4), (12, 12), (20, 12)])
def test_a_core_has_the_adapters_rank_or_the_bases(rank: int, kept: int) -> None:
    pairs = related(0, 8, size=12, rank=rank)
    basis = fit(lambda: pairs, 12)
    for A, B in pairs:
        a, b = halves(basis, A, B)
        assert a.shape == (kept, 12) and b.shape == (12, kept)
        torch.testing.assert_close(basis.U @ b @ a @ basis.V.T, B @ A, rtol=0, atol=1e-5 * float((B @ A).norm()))


def test_a_far_adapter_is_kept_bit_for_bit(tmp_path: Path) -> None:
    sources = family(tmp_path, 0, 8) | family(tmp_path, 50, 1, "far")
    (sources["far0"] / "README.md").write_text("About it.\n")
    report = compress(sources, tmp_path / "store", basis=6)
    store = CompressedStore.load(tmp_path / "store")
    assert report.raw == store.raw == ["far0"] and report.errors["far0"] > 0.3 >= max(
        error for name, error in report.errors.items() if name != "far0"
    )
    kept = {name: digest for name, digest in digests(sources["far0"]).items() if name != "generated.json"}
    assert digests(tmp_path / "store" / "raw" / "far0") == kept and len(kept) == 3
    own = of_adapter(Adapter.load(sources["far0"]))
    assert all(torch.equal(A, own[n][0]) and torch.equal(B, own[n][1]) for n, (A, B) in store.factors("far0").items())
    store.export("far0", tmp_path / "exported")
    assert digests(tmp_path / "exported") == kept
    everything = compress(sources, tmp_path / "strict", basis=3, most_error=0)
    assert len(everything.raw) == 9 and everything.median_error is None and everything.worst_error is None


def test_those_kept_raw_have_no_say_in_the_bases(tmp_path: Path) -> None:
    sources = family(tmp_path, 0, 8) | family(tmp_path, 50, 3, "far", noise=1.0)
    steps: list[str] = []
    report = compress(
        sources, tmp_path / "store", basis=6, dtype=torch.float32, on_step=lambda what, *_: steps.append(what)
    )
    store = CompressedStore.load(tmp_path / "store")
    assert report.raw == ["far0", "far1", "far2"] and "bases of those near" in steps
    near = {name: path for name, path in sources.items() if name not in report.raw}
    compress(near, tmp_path / "alone", basis=6, dtype=torch.float32)
    alone = CompressedStore.load(tmp_path / "alone")
    for name in near:
        assert store.error(name) == alone.error(name) < 1e-6
    assert digests(tmp_path / "store/cores") == digests(tmp_path / "alone/cores")
    assert sorted(digests(tmp_path / "store/cores")) == sorted(f"{name}.safetensors" for name in near)


def test_each_cluster_has_bases_of_its_own(tmp_path: Path) -> None:
    sources = family(tmp_path, 0, 6) | family(tmp_path, 50, 6, "b")
    one = compress(sources, tmp_path / "one", basis=6, most_error=1)
    two = compress(sources, tmp_path / "two", basis=6, most_error=1, clusters=2, seed=3)
    assert two.clusters == 2 and two.worst_error is not None and two.worst_error < 0.01
    assert one.median_error is not None and one.median_error > 0.3
    store = CompressedStore.load(tmp_path / "two")
    assert [store.manifest.adapters[name].cluster for name in store.names] == [0] * 6 + [1] * 6
    for name, path in sources.items():
        assert far(products(store.factors(name)), source_products(path)) < 0.01
    compress(sources, tmp_path / "again", basis=6, most_error=1, clusters=2, seed=3)
    assert digests(tmp_path / "again") == digests(tmp_path / "two")


def test_ranks_and_modules_may_differ(tmp_path: Path, base: Any, adapters: dict[str, Path]) -> None:
    report = compress(adapters, tmp_path / "store", dtype=torch.float32)
    assert report.worst_error is not None and report.worst_error < 1e-5 and not report.raw
    store = CompressedStore.load(tmp_path / "store")
    for name, path in adapters.items():
        own = source_products(path)
        assert products(store.factors(name)).keys() == own.keys()  # no core where there was no module
    ids = torch.arange(3, 40).view(1, -1)
    for name, path in adapters.items():
        store.export(name, tmp_path / name)
        with torch.no_grad():
            found, wanted = (
                PeftModel.from_pretrained(copy.deepcopy(base), place).eval()(ids).logits
                for place in (tmp_path / name, path)
            )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, base(ids).logits, atol=1e-2)


def test_what_is_exported_is_as_near_as_it_says(tmp_path: Path, base: Any) -> None:
    sources = family(tmp_path, 0, 8, size=5, noise=0.2)
    compress(sources, tmp_path / "store", basis=7)
    store = CompressedStore.load(tmp_path / "store")
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        plain = base(ids).logits
        for name in store.names[:3]:
            store.export(name, tmp_path / "out" / name)
            assert far(source_products(tmp_path / "out" / name), source_products(sources[name])) == pytest.approx(
                store.error(name), rel=0.02
            )  # bfloat16 once more
            found, wanted = (
                PeftModel.from_pretrained(copy.deepcopy(base), place).eval()(ids).logits
                for place in (tmp_path / "out" / name, sources[name])
            )
            assert 0.02 < store.error(name) < 0.3
            assert float((found - wanted).norm() / (wanted - plain).norm()) < 2 * store.error(name)
    about = json.loads((tmp_path / "out" / "a0" / "generated.json").read_text())
    assert about["error"] == store.error("a0") and about["made_from"] == "a compressed store"


def test_one_comes_later_and_one_goes(tmp_path: Path) -> None:
    every = family(tmp_path, 0, 8) | family(tmp_path, 50, 3, "b")
    late = {name: every.pop(name) for name in ("a7", "b2")} | family(tmp_path, 90, 1, "far")
    compress(every, tmp_path / "store", basis=6, clusters=2)
    store, other = (CompressedStore.load(tmp_path / "store") for _ in range(2))
    before = digests(tmp_path / "store")
    for name, cluster in (("a7", 0), ("b2", 1)):
        assert store.add(name, late[name]) == store.error(name) < 0.01
        assert store.manifest.adapters[name].cluster == cluster
        assert far(products(store.factors(name)), source_products(late[name])) < 0.01
    left = tmp_path / "store" / "raw" / "far0"
    left.mkdir(parents=True)
    (left / "half").touch()  # of an interruption
    assert other.add("far0", late["far0"]) > 0.3 and other.raw == ["far0"]
    assert set(other.names) == {*every, *late}  # who writes knows what others wrote
    after = digests(tmp_path / "store")
    assert after.keys() - before.keys() == {
        "cores/a7.safetensors", "cores/b2.safetensors", "raw/far0/adapter_config.json", f"raw/far0/{WEIGHTS_FILE}"
    }  # fmt: skip
    assert {name for name in before if after[name] != before[name]} == {"store.json"}
    store = CompressedStore.load(tmp_path / "store")
    with pytest.raises(StackError, match="remove it first"):
        store.add("a7", late["a7"])
    for name in late:
        store.remove(name)
    assert store.names == list(every) and digests(tmp_path / "store") == before
    for gone in (lambda: store.remove("a7"), lambda: store.factors("a7"), lambda: store.error("a7")):
        with pytest.raises(AdapterNotFoundError, match="has no adapter 'a7'; it has: a0, a1"):
            gone()


def test_adapters_of_one_shape_have_their_own_scales(tmp_path: Path) -> None:
    """What adapters are alike in is kept once for all of them."""
    sources = family(tmp_path, 0, 2)
    file = sources["a1"] / "adapter_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "lora_alpha": 3 * about["lora_alpha"]}))
    compress(sources, tmp_path / "store", basis=6, dtype=torch.float32)
    store = CompressedStore.load(tmp_path / "store")
    for name, path in sources.items():
        assert far(products(store.factors(name)), source_products(path)) < 1e-5


def test_two_writers_do_not_lose_each_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = family(tmp_path, 0, 4)
    compress({name: every[name] for name in ("a0", "a1")}, tmp_path / "store", basis=6)
    keep = store_module.keep

    def slow(*given: Any) -> Any:
        time.sleep(0.2)  # so that one reads store.json before the other one writes it, were they let
        return keep(*given)

    monkeypatch.setattr(store_module, "keep", slow)
    with ThreadPoolExecutor(2) as pool:
        stores = [CompressedStore.load(tmp_path / "store") for _ in range(2)]
        list(pool.map(lambda store, name: store.add(name, every[name]), stores, ("a2", "a3")))
    assert sorted(CompressedStore.load(tmp_path / "store").names) == sorted(every)


def test_who_shares_nothing_is_kept_whole_whatever_may_be_lost(tmp_path: Path) -> None:
    compress(family(tmp_path, 0, 2), tmp_path / "store", basis=6, most_error=1)
    store = CompressedStore.load(tmp_path / "store")
    A, B = of_adapter(Adapter.load(tmp_path / "a0"))[Q]
    write_factors(tmp_path / "other", {"model.layers.2.mlp.up_proj": (A, B)}, "", dtype=torch.float32)
    left = tmp_path / "store" / "cores" / "other.safetensors"
    left.touch()  # of an interruption
    assert store.add("other", tmp_path / "other") == 1.0 and store.raw == ["other"] and not left.exists()
    assert far(products(store.factors("other")), source_products(tmp_path / "other")) < 1e-6


def test_what_comes_later_may_have_other_modules(tmp_path: Path) -> None:
    sources = family(tmp_path, 0, 4)
    compress(sources, tmp_path / "store", basis=6, most_error=0.9)
    store = CompressedStore.load(tmp_path / "store")
    A, B = of_adapter(Adapter.load(sources["a0"]))[Q]
    write_factors(tmp_path / "more", {Q: (A, B), "model.layers.2.mlp.up_proj": (A / 2, 1 * B)}, "", dtype=torch.float32)
    assert store.add("more", tmp_path / "more") == pytest.approx(0.2**0.5, rel=1e-3)  # of norms 1 and 1/2
    assert list(store.factors("more")) == [Q]
    write_factors(tmp_path / "other", {"model.layers.2.mlp.up_proj": (A, B)}, "", dtype=torch.float32)
    assert store.add("other", tmp_path / "other") == 1.0 and store.raw == ["other"]
    write_factors(tmp_path / "new", {Q: (A, 0 * B)}, "", dtype=torch.float32)
    assert store.add("new", tmp_path / "new") == 0.0 and not products(store.factors("new"))[Q].any()


def test_weights_of_the_base_are_not_lost(tmp_path: Path) -> None:
    sources = family(tmp_path, 0, 4)
    tensors = load_file(sources["a1"] / WEIGHTS_FILE)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(7, 3)
    save_file(tensors, sources["a1"] / WEIGHTS_FILE, metadata={"format": "pt"})
    assert compress(sources, tmp_path / "store").raw == ["a1"]
    assert digests(tmp_path / "store" / "raw" / "a1")[WEIGHTS_FILE] == digests(sources["a1"])[WEIGHTS_FILE]


def test_what_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, out = family(tmp_path / "in", 0, 4), tmp_path / "store"
    for settings, sentence in (
        ({"basis": 0}, "at least 1 direction"),
        ({"most_error": -0.1}, "0 or more"),
        ({"most_error": float("nan")}, "0 or more"),
        ({"clusters": 5}, "1 to 4 clusters"),
        ({"clusters": 0}, "1 to 4 clusters"),
        ({"rounds": 0}, "at least 1 round"),
        ({"dtype": torch.float16}, "float32 or bfloat16"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            compress(sources, out, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one"):
        compress({}, out)
    for name in ("../up", "a/b", "auto", ""):
        with pytest.raises(StackError, match="cannot name an adapter"):
            compress({**sources, name: sources["a0"]}, out)
    with pytest.raises(AdapterNotFoundError):
        compress({**sources, "gone": tmp_path / "in" / "gone"}, out)
    other = family(tmp_path / "in", 0, 1, "other", base="another/Model")
    with pytest.raises(AdapterMismatchError, match="other0 is for another/Model, and others are for some/base"):
        compress({**sources, **other}, out)
    A, B = of_adapter(Adapter.load(sources["a0"]))[Q]
    write_factors(tmp_path / "in" / "small", {Q: (A[:, :16], B)}, "some/base")
    with pytest.raises(AdapterMismatchError, match="maps 16 to 32 features in .*q_proj, and others are for 32 to 32"):
        compress({**sources, "small": tmp_path / "in" / "small"}, out)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(store_module, "keep", fail)
        compress(sources, out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    out.mkdir()
    with pytest.raises(ConfigError, match="exists: choose another folder"):
        compress(sources, out)
    assert not list(out.iterdir())


def test_a_base_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    sources = (
        family(tmp_path, 0, 2) | family(tmp_path, 0, 1, "b", base="/models/Base/") | family(tmp_path, 0, 1, "c", "")
    )
    compress(sources, tmp_path / "store", basis=6)
    store = CompressedStore.load(tmp_path / "store")
    assert store.manifest.base == "some/base"
    before = digests(tmp_path / "store")
    with pytest.raises(AdapterMismatchError, match="late0 is for b, and the store is for some/base"):
        store.add("late0", family(tmp_path, 0, 1, "late", base="b")["late0"])
    A, B = of_adapter(Adapter.load(sources["a0"]))[Q]
    write_factors(tmp_path / "small", {Q: (A, B[:16])}, "some/base")
    with pytest.raises(AdapterMismatchError, match="maps 32 to 16 features"):
        store.add("small", tmp_path / "small")
    with pytest.raises(StackError, match="cannot name"):
        store.add("../a", sources["a0"])
    with pytest.raises(ConfigError, match="exists"):
        store.export("a0", tmp_path / "a0")
    assert digests(tmp_path / "store") == before


def edit(change: Any) -> Any:
    """A change of store.json."""

    def damage(store: Path) -> None:
        about = json.loads((store / "store.json").read_text())
        change(about)
        (store / "store.json").write_text(json.dumps(about))

    return damage


def cut(file: str) -> Any:
    def damage(store: Path) -> None:
        content = (store / file).read_bytes()
        (store / file).write_bytes(content[: len(content) - 10])

    return damage


def replace_tensors(file: str, change: Any) -> Any:
    def damage(store: Path) -> None:
        save_file({name: change(tensor).contiguous() for name, tensor in load_file(store / file).items()}, store / file)

    return damage


def rename(about: dict[str, Any]) -> None:
    about["adapters"]["../a0"] = about["adapters"].pop("a0")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param(cut("store.json"), r"store\.json is damaged", id="json cut"),
        pytest.param(edit(rename), r"'\.\./a0' cannot name", id="a name that is a path"),
        pytest.param(edit(lambda about: about.update(format=9)), "has format 9", id="another format"),
        pytest.param(edit(lambda about: about.pop("base")), "is damaged", id="a key is missing"),
        pytest.param(edit(lambda about: about.update(dtype="int4")), "int4", id="another dtype"),
        pytest.param(edit(lambda about: about.update(basis=0)), "basis 0", id="no direction"),
        pytest.param(edit(lambda about: about.update(basis=float("inf"))), "is damaged", id="endless directions"),
        pytest.param(edit(lambda about: about.update(most_error=10**400)), "is damaged", id="an error of no float"),
        pytest.param(edit(lambda about: about.update(most_error=float("nan"))), "most_error nan", id="no error"),
        pytest.param(edit(lambda about: about["adapters"]["a0"].update(cluster=1)), "is damaged", id="no such cluster"),
        pytest.param(edit(lambda about: about["adapters"]["a0"].update(error="x")), "is damaged", id="no number"),
        pytest.param(edit(lambda about: about["adapters"]["a0"].update(more=1)), "is damaged", id="unknown key"),
        pytest.param(edit(lambda about: about["clusters"][0][Q].update(V=[4, 8])), "has shape", id="no basis"),
        pytest.param(edit(lambda about: about["clusters"][0][Q].update(V=[32, 5])), "says", id="shapes of bases"),
        pytest.param(edit(lambda about: about["clusters"][0].pop(Q)), "says None", id="a basis too many"),
        pytest.param(cut("bases/0.safetensors"), r"0\.safetensors is missing or damaged", id="bases cut"),
        pytest.param(cut("cores/a0.safetensors"), r"a0\.safetensors is missing or damaged", id="cores cut"),
        pytest.param(lambda store: (store / "cores/a0.safetensors").unlink(), "missing", id="no cores"),
        pytest.param(replace_tensors("cores/a0.safetensors", lambda S: S[:3]), r"shape \(3, ", id="cores' shapes"),
        pytest.param(
            replace_tensors("cores/a0.safetensors", lambda S: S[:3] if S.shape[1] == 6 else S),
            "no whole core",
            id="ranks",
        ),
        pytest.param(replace_tensors("bases/0.safetensors", lambda U: U[:9]), "says", id="bases' shapes"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path: Path, damage: Any, sentence: str) -> None:
    compress(family(tmp_path, 0, 3), tmp_path / "store", basis=6)
    damage(tmp_path / "store")
    with pytest.raises(AdapterFormatError, match=sentence):
        CompressedStore.load(tmp_path / "store").factors("a0")


def test_no_store_and_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="molora compress"):
        CompressedStore.load(tmp_path / "nowhere")
    compress(family(tmp_path, 0, 3), tmp_path / "store", basis=6)
    replace_tensors("cores/a0.safetensors", lambda S: S * float("nan"))(tmp_path / "store")
    store = CompressedStore.load(tmp_path / "store")
    with pytest.raises(NonFiniteError, match="damaged"):
        store.export("a0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.remove("a0")  # what is damaged can go
    assert far(products(store.factors("a1")), source_products(tmp_path / "a1")) < 0.01


def run(*arguments: Any) -> None:
    app = typer.Typer()
    app.command()(command)
    app([str(one) for one in arguments], standalone_mode=False)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    family(tmp_path / "in", 0, 8)
    family(tmp_path / "in", 50, 1, "far")
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / ".partial-1").mkdir()
    (tmp_path / "in" / ".partial-1" / "adapter_config.json").touch()
    run(tmp_path / "in", "--basis", 6, "--out", tmp_path / "store", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == 9 and found["raw"] == ["far0"] and found["clusters"] == 1
    assert 0 < found["median_error"] <= found["worst_error"] < 0.3 < found["errors"]["far0"]
    assert found["share"] == pytest.approx(found["bytes_after"] / found["bytes_before"])
    assert CompressedStore.load(found["store"]).names == [*(f"a{number}" for number in range(8)), "far0"]
    run(tmp_path / "in", "--basis", 6, "--clusters", 2, "--most-error", 1, "--seed", 1, "--out", tmp_path / "two")
    said = capsys.readouterr().out
    assert "adapters" in said and "kept raw      0" in said and "median" in said and "%)" in said
    assert "bytes before" in said and f"{found['bytes_before']:,}" in said
    run(tmp_path / "in", "--basis", 1, "--most-error", 0, "--out", tmp_path / "three")
    assert "none is compressed" in capsys.readouterr().out
    with pytest.raises(AdapterNotFoundError, match="holds no adapters"):
        run(tmp_path, "--out", tmp_path / "four")
    with pytest.raises(ConfigError, match="exists"):
        run(tmp_path / "in", "--out", tmp_path / "store")
    assert not (tmp_path / "four").exists()
