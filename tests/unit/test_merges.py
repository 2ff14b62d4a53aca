"""Merged adapters, against float64 products, PEFT's own functions and PEFT's merges."""

import copy
import inspect
import json
import math
import shutil
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from molora.adapter import Adapter, LoRAWeights
from molora.commands.merge import merge as command
from molora.compose.merge import MergeReport, merge
from molora.compose.methods import OF_FACTORS, Method, combined, merged, nearest_of_delta
from molora.compose.source import Source
from molora.errors import AdapterError, AdapterMismatchError, AdapterNotFoundError, ConfigError, NonFiniteError
from tests.conftest import write_adapter

ALL = get_args(Method)
OF_DELTAS = [method for method in ALL if method.endswith("_svd")]
PRUNES = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
Q = "model.layers.0.self_attn.q_proj"


def part(seed: int, rank: int = 4, scale: float = 1.0, inputs: int = 24, outputs: int = 20) -> LoRAWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoRAWeights(
        torch.randn(rank, inputs, generator=generator) / 5, torch.randn(outputs, rank, generator=generator) / 2, scale
    )


def delta(weights: LoRAWeights) -> torch.Tensor:
    return weights.scale * (weights.B.double() @ weights.A.double())


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert all(tensor.dtype == torch.float32 for tensor in pair)
    return pair[1].double() @ pair[0].double()


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def dense(path: Path) -> dict[str, torch.Tensor]:
    """The deltas of a folder, by its tensors and its config alone: alpha being the rank."""
    return {name: delta(weights) for name, weights in Adapter.load(path).modules.items()}


def plain(kind: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Pruning, election and sum, element by element; no chance in it."""
    kept = []
    for tensor in tensors:
        order = tensor.abs().flatten().argsort(descending=True)[: int(density * tensor.numel())]
        mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
        mask[order] = 1
        kept.append(tensor * mask.view_as(tensor))
    if kind == "magnitude_prune":
        return torch.stack([weight * tensor for weight, tensor in zip(weights, kept, strict=True)]).sum(0)
    found = torch.zeros(tensors[0].shape, dtype=tensors[0].dtype)
    for place in range(found.numel()):
        values = [float(tensor.flatten()[place]) for tensor in kept]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * value for w, value in zip(weights, values, strict=True) if value * sign > 0]
        found.view(-1)[place] = sum(agreeing) / max(len(agreeing), 1)
    return found


class TestMethods:
    def test_cat_is_the_sum_of_the_products(self) -> None:
        parts = [part(1), part(2, 8, 0.5), part(3, 1, 4.0)]
        A, B = merged(parts, [0.5, -0.3, 2.0], "cat")
        assert (A.shape, B.shape) == ((13, 24), (20, 13))
        wanted = 0.5 * delta(parts[0]) - 0.3 * delta(parts[1]) + 2 * delta(parts[2])
        assert distance(product((A, B)), wanted) < 1e-6

    @pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, -1.0, 0.5)], ids=["mean", "task-arithmetic"])
    @pytest.mark.parametrize("rank", [None, 1, 5, 13, 40], ids=lambda rank: f"rank-{rank}")
    def test_svd_is_the_best_of_its_rank(self, weights: tuple[float, ...], rank: int | None) -> None:
        parts = [part(1), part(2, 8, 0.5), part(3, 1, 4.0)]
        found = merged(parts, weights, "svd", rank=rank)
        assert len(found[0]) == min(rank or 8, 13)
        exact = sum(weight * delta(one) for weight, one in zip(weights, parts, strict=True))
        assert isinstance(exact, torch.Tensor)
        assert distance(product(found), cut(exact, rank or 8)) < 1e-5

    def test_svd_where_the_ranks_are_more_than_the_sizes(self) -> None:
        parts = [part(seed, 16, inputs=24, outputs=10) for seed in (1, 2, 3)]
        exact = sum((delta(one) for one in parts), torch.zeros(10, 24))
        assert distance(product(merged(parts, [1, 1, 1], "svd", rank=30)), exact) < 1e-5

    @pytest.mark.parametrize("kind", PRUNES)
    @pytest.mark.parametrize("density", [0.3, 0.5, 0.999, 1.0])
    @pytest.mark.parametrize("shape", [(20, 24), (300, 200)], ids=["small", "sampled"])
    def test_sums_are_those_of_peft(self, kind: str, density: float, shape: tuple[int, int]) -> None:
        tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        weights = [0.5, -0.3, 1.0, 0.0]
        torch.manual_seed(11)
        with warnings.catch_warnings():  # PEFT warns at density 1
            warnings.simplefilter("ignore")
            wanted = getattr(merge_utils, kind)(tensors, torch.tensor(weights), density)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copies = [tensor.clone() for tensor in tensors]
            found = combined(copies, weights, kind, density, torch.Generator().manual_seed(11))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert int((found == 0).sum()) == int((wanted == 0).sum())

    @pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
    @pytest.mark.parametrize("density", [0.3, 1.0])
    def test_sums_are_those_of_a_plain_loop(self, kind: str, density: float) -> None:
        tensors = [torch.randn(9, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        wanted = plain(kind, tensors, [0.5, -0.3, 1.0], density)
        found = combined([one.clone() for one in tensors], [0.5, -0.3, 1.0], kind, density, torch.Generator())
        torch.testing.assert_close(found, wanted)

    def test_of_equal_numbers_as_many_are_kept_as_are_to_be(self) -> None:
        coarse = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)).mul(2).round()
        for density in (0.1, 0.37, 0.9):
            kept = combined([coarse.clone()], [1.0], "magnitude_prune", density, torch.Generator())
            order = coarse.abs().flatten().sort(descending=True).values[: int(density * 20000)]
            assert torch.equal(kept.abs().flatten().sort(descending=True).values[: len(order)], order)
            assert int((kept != 0).sum()) == int((order != 0).sum())
            assert torch.equal(kept[kept != 0], coarse[kept != 0])
        assert combined([torch.ones(2)], [1.0], "magnitude_prune", 0.5, torch.Generator()).tolist() == [1, 0]
        assert not combined([coarse.clone()], [1.0], "ties", 1e-6, torch.Generator()).any()

    def test_what_is_not_finite_is_not_pruned_away(self) -> None:
        tensor = torch.randn(300, 100)
        tensor[3, 4], tensor[5, 6] = math.nan, math.inf
        kept = combined([tensor], [1.0], "magnitude_prune", 0.01, torch.Generator())
        assert kept[3, 4].isnan() and kept[5, 6].isinf()

    @pytest.mark.parametrize("method", OF_FACTORS)
    def test_of_the_factors_apart(self, method: Method) -> None:
        """PEFT's rule: the root of |w s| on both sides, the sign on A."""
        parts = [part(1, scale=2.0), part(2, scale=0.7), part(3, scale=1.3)]
        weights = [0.5, -0.3, 1.0]
        roots = torch.tensor([abs(w * one.scale) ** 0.5 for w, one in zip(weights, parts, strict=True)])
        kind, density = ("task_arithmetic", ()) if method == "linear" else (method, (0.6,))
        torch.manual_seed(5)
        signed = roots * torch.tensor(weights).sign()
        A = getattr(merge_utils, kind)([one.A for one in parts], signed, *density)
        B = getattr(merge_utils, kind)([one.B for one in parts], roots, *density)
        before = [one.A.clone() for one in parts]
        found = merged(parts, weights, method, density=0.6, seed=5)
        torch.testing.assert_close(found[0], A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], B, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(one.A, old) for one, old in zip(parts, before, strict=True))  # nothing was written over

    @pytest.mark.parametrize("method", OF_DELTAS)
    @pytest.mark.parametrize("outputs", [20, 40], ids=["wide", "tall"])
    def test_of_the_deltas(self, method: Method, outputs: int) -> None:
        parts = [part(1, outputs=outputs), part(2, 8, 0.5, outputs=outputs), part(3, 2, 3.0, outputs=outputs)]
        weights = [0.5, -0.3, 1.0]
        torch.manual_seed(7)
        function = getattr(merge_utils, method.removesuffix("_svd"))
        wanted = function([delta(one).float() for one in parts], torch.tensor(weights), 0.4)
        for rank in (None, 3, 100):
            found = merged(parts, weights, method, density=0.4, seed=7, rank=rank)
            assert len(found[0]) == min(rank or 8, 24, outputs)
            assert distance(product(found), cut(wanted, rank or 8)) < 1e-4

    @pytest.mark.parametrize(
        "values",
        [
            pytest.param(torch.ones(60), id="flat"),
            pytest.param(torch.logspace(0, -12, 60), id="steep"),
            pytest.param(torch.cat([torch.logspace(0, -4, 8), torch.zeros(52)]), id="less-than-the-rank"),
            pytest.param(torch.zeros(60), id="nothing"),
        ],
    )
    @pytest.mark.parametrize("shape", [(60, 90), (90, 60)], ids=["wide", "tall"])
    def test_the_best_of_a_rank_without_factors(self, values: torch.Tensor, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in shape)
        matrix = (left * values.double()) @ right.T
        A, B = nearest_of_delta(matrix.float(), 8)
        assert (A.shape, B.shape) == ((8, shape[1]), (shape[0], 8))
        best = (cut(matrix, 8) - matrix).norm()
        missed = (B.double() @ A.double() - matrix).norm()
        assert missed <= best * (1 + 1e-4) + 1e-6 * matrix.norm()


def dense_knots(
    parts: Sequence[LoRAWeights], weights: Sequence[float], density: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition, on the deltas in float64."""
    deltas = [delta(one) for one in parts]
    left, values, right = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum())
    aligned = [values[:rank, None] * piece for piece in right[:rank].split(deltas[0].shape[1], 1)]
    return plain("ties", aligned, weights, density), left[:, :rank]


class TestKnots:
    @pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
    @pytest.mark.parametrize("outputs", [20, 10], ids=["fewer-ranks", "more-ranks-than-outputs"])
    def test_is_the_dense_definition(self, density: float, outputs: int) -> None:
        parts = [part(1, outputs=outputs), part(2, 6, 0.5, outputs=outputs), part(3, 2, 3.0, outputs=outputs)]
        weights = [0.5, -0.3, 1.0]
        A, B = dense_knots(parts, weights, density)
        found = merged(parts, weights, "knots", density=density)
        assert len(found[0]) == min(12, outputs)
        assert distance(product(found), B @ A) < 1e-5
        short = merged(parts, weights, "knots", density=density, rank=3)
        assert len(short[0]) == 3
        assert distance(product(short), cut(B @ A, 3)) < 1e-5

    def test_one_adapter_is_itself(self) -> None:
        one = part(1, scale=0.7)
        found = merged([one], [1.0], "knots", density=1.0)
        assert len(found[0]) == 4
        assert distance(product(found), delta(one)) < 1e-6

    def test_the_same_twice_takes_no_more_rank(self) -> None:
        found = merged([part(1), part(1)], [0.5, 0.5], "knots", density=1.0)
        assert len(found[0]) == 4
        assert distance(product(found), delta(part(1)) / 2) < 1e-6  # a mean of halves, as PEFT's TIES weighs

    def test_adapters_of_separate_outputs_do_not_disturb_each_other(self) -> None:
        """Then TIES has one of them in each direction, and the sum is left: with noise for a neighbour it were half."""
        parts = [part(1), part(2), part(3)]
        for place, one in enumerate(parts):
            mask = torch.zeros(20, 1)
            mask[place * 6 : place * 6 + 6] = 1
            parts[place] = LoRAWeights(one.A, one.B * mask, 0.5)
        weights = [0.5, -0.3, 1.0]
        wanted = sum((w * delta(one) for w, one in zip(weights, parts, strict=True)), torch.zeros(20, 24))
        assert distance(product(merged(parts, weights, "knots", density=1.0)), wanted) < 1e-5
        ties = merge_utils.ties([delta(one).float() for one in parts], torch.tensor(weights), 1 - 1e-9).double()
        assert distance(product(merged(parts, weights, "knots", density=1.0)), ties) < 1e-5

    def test_nothing_stays_nothing(self) -> None:
        empty = LoRAWeights(torch.randn(2, 24), torch.zeros(20, 2), 1.0)
        A, B = merged([empty, empty], [1.0, 1.0], "knots")
        assert not (B @ A).any() and len(A) == 1


KINDS: dict[str, dict[str, Any]] = {
    "even": {},
    "root": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "few": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "uneven": {
        "r": 3,
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"o_proj": 3},
    },
}
WEIGHTS = (0.5, 0.3, -0.7, 0.2)


@pytest.fixture(scope="module")
def kinds(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: write_adapter(base, root / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items(), 1)}


@pytest.fixture(scope="module")
def alike(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alike")
    return {name: write_adapter(base, root / name, seed) for seed, name in enumerate("abc", 1)}


def exact_sum(adapters: dict[str, Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, weight in zip(adapters.values(), weights, strict=True):
        for name, own in dense(path).items():
            found[name] = found.get(name, torch.zeros(())) + weight * own
    return found


class TestMerge:
    def test_cat_is_exact_and_peft_runs_it(
        self, base: Any, kinds: dict[str, Path], ids: torch.Tensor, tmp_path: Path
    ) -> None:
        report = merge(kinds, tmp_path / "made", weights=WEIGHTS)
        wanted = exact_sum(kinds, WEIGHTS)
        found = dense(tmp_path / "made")
        assert set(found) == set(wanted)
        assert max(distance(found[name], wanted[name]) for name in wanted) < 1e-6
        assert report.error < 1e-6 and report.ranks[Q] == 4 + 8 + 1 + 3
        summed = copy.deepcopy(base).double()
        for name, matrix in wanted.items():
            summed.get_submodule(name).weight.data += matrix
        with torch.no_grad():
            logits = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "made").eval()(ids).logits
            right = summed(ids).logits
            assert distance(logits, right) < 1e-5
            assert distance(base(ids).logits, right) > 0.01

    @pytest.mark.parametrize("method", ["svd", *OF_DELTAS, "knots"])
    def test_what_is_written_is_what_the_method_makes(
        self, kinds: dict[str, Path], tmp_path: Path, method: Method
    ) -> None:
        merge(kinds, tmp_path / "made", method, weights=WEIGHTS, density=1.0, rank=60)
        found = dense(tmp_path / "made")
        sources = [Adapter.load(path).modules for path in kinds.values()]
        for name, matrix in found.items():
            present = [(own[name], weight) for own, weight in zip(sources, WEIGHTS, strict=True) if name in own]
            if "ties" in method:
                wanted = plain("ties", [delta(own) for own, _ in present], [weight for _, weight in present], 1.0)
            elif method == "knots":
                A, B = dense_knots([own for own, _ in present], [weight for _, weight in present], 1.0)
                wanted = B @ A
            else:
                wanted = exact_sum(kinds, WEIGHTS)[name]
            assert distance(matrix, wanted) < 1e-4

    @pytest.mark.parametrize("method", [method for method in ALL if method not in ("cat", "knots")])
    def test_where_peft_is_right_it_is_the_same(
        self, base: Any, alike: dict[str, Path], tmp_path: Path, method: Method
    ) -> None:
        """Adapters without rsLoRA or patterns. DARE keeps all here: PEFT's choice hangs on the modules before."""
        weights = [0.6, -0.3, 0.5]
        density = 1.0 if method.startswith("dare") else 0.5
        theirs = peft_merge(base, alike, weights, method, density, rank=6)
        merge(
            alike, tmp_path / "made", method, weights=weights, density=density,
            rank=None if method in OF_FACTORS else 6,
        )  # fmt: skip
        found = dense(tmp_path / "made")
        for name, matrix in theirs.items():
            assert distance(found[name], matrix) < 2e-4, name

    @pytest.mark.parametrize("method", ["cat", "svd"])
    def test_where_peft_is_wrong(self, base: Any, tmp_path: Path, method: Method) -> None:
        """PEFT 0.21: a merge takes the first source's rsLoRA over, and so acts sqrt(its rank) times as strongly.

        That its svd applies a scaling twice, as earlier versions did, is not so any more.
        """
        root = {"use_rslora": True}
        first = {name: write_adapter(base, tmp_path / name, seed, **root) for seed, name in enumerate("ab", 1)}
        mixed = {"plain": write_adapter(base, tmp_path / "plain", 3), "root": first["a"]}
        for adapters, excess in ((first, 8**0.5), (mixed, 1.0)):
            theirs = peft_merge(base, adapters, [0.6, 0.4], method, None, rank=8)[Q]
            right = exact_sum(adapters, [0.6, 0.4])[Q]
            assert distance(theirs, excess * right) < 1e-5
            out = tmp_path / f"made-{excess:.0f}"
            merge(adapters, out, method, weights=[0.6, 0.4], rank=None if method == "cat" else 8)
            assert distance(dense(out)[Q], right) < 1e-5

    @pytest.mark.parametrize("method", [method for method in ALL if method not in OF_FACTORS])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_errors_are_those_of_dense_products(
        self, kinds: dict[str, Path], tmp_path: Path, method: Method, dtype: torch.dtype
    ) -> None:
        report = merge(kinds, tmp_path / "made", method, weights=WEIGHTS, dtype=dtype)
        wanted, found = exact_sum(kinds, WEIGHTS), dense(tmp_path / "made")
        for name, error in report.errors.items():
            assert error == pytest.approx(distance(found[name], wanted[name]), rel=1e-6, abs=1e-9)
        missed = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
        whole = sum(float(matrix.square().sum()) for matrix in wanted.values())
        assert report.error == pytest.approx((missed / whole) ** 0.5, rel=1e-6, abs=1e-9)
        assert report.bytes == (tmp_path / "made" / "adapter_model.safetensors").stat().st_size
        assert report.ranks == {name: own.rank for name, own in Adapter.load(tmp_path / "made").modules.items()}

    def test_an_error_of_nothing_is_nothing(self) -> None:
        report = MergeReport(Path(), "svd", {"a": (0.0, 0.0), "b": (3.0, 4.0), "c": (1.0, 0.0)}, {}, {}, 0.0, 0)
        assert report.errors == {"a": 0.0, "b": 0.75, "c": math.inf}
        assert report.error == pytest.approx(10**0.5 / 4)

    @pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties_svd", "knots"])
    def test_what_cancels_is_nothing(self, alike: dict[str, Path], tmp_path: Path, method: Method) -> None:
        """What rounding leaves of it is no sum of which a part could be lost."""
        same = shutil.copytree(alike["a"], tmp_path / "same")
        report = merge({"a": alike["a"], "same": same}, tmp_path / "made", method, weights=[0.3, -0.3], density=1.0)
        assert report.error == 0.0 and set(report.errors.values()) == {0.0}

    def test_a_missing_module_counts_as_zero(self, base: Any, alike: dict[str, Path], tmp_path: Path) -> None:
        few = write_adapter(base, tmp_path / "few", 9, target_modules=["q_proj"])
        adapters = {"a": alike["a"], "few": few}
        report = merge(adapters, tmp_path / "made", "ties", density=0.5)
        lacking = {name for name in Adapter.load(alike["a"]).modules if not name.endswith("q_proj")}
        assert set(report.filled) == {"few"} and set(report.filled["few"]) == lacking
        own = Adapter.load(alike["a"]).modules
        name = "model.layers.2.mlp.up_proj"
        shares = torch.tensor([(0.5 * own[name].scale) ** 0.5] * 2)
        A = merge_utils.ties([own[name].A, torch.zeros_like(own[name].A)], shares, 0.5)
        B = merge_utils.ties([own[name].B, torch.zeros_like(own[name].B)], shares, 0.5)
        assert distance(dense(tmp_path / "made")[name], B.double() @ A.double()) < 1e-5

    def test_weights_of_the_base_are_told(
        self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path
    ) -> None:
        """PEFT writes them beside LoRA on a head; who merged does not know whether they are the base's."""
        keep_only(alike["b"], tmp_path / "head", "")
        file = tmp_path / "head" / "adapter_model.safetensors"
        save_file(load_file(file) | {"base_model.model.lm_head.base_layer.weight": torch.ones(99, 32)}, file)
        report = merge({"a": alike["a"], "head": tmp_path / "head"}, tmp_path / "made")
        assert list(report.left_out) == ["head"]
        merge({"a": alike["a"], "b": alike["b"]}, tmp_path / "same")
        assert written(tmp_path / "made") == written(tmp_path / "same")
        line = [alike["a"], tmp_path / "head", "--out", tmp_path / "told"]
        assert f"{tmp_path / 'head'} brings weights of the base too: they are not in" in run(*line).stdout

    @pytest.mark.parametrize("method", ["cat", "ties_svd", "dare_ties", "knots"])
    def test_modules_side_by_side(
        self, alike: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
    ) -> None:
        read, held = Source.weights, list[tuple[str, weakref.ref[torch.Tensor]]]()
        met, reads, most = threading.Barrier(2), Counter[int](), list[int]()

        def watched(self: Source, module: str) -> LoRAWeights | None:
            reads[threading.get_ident()] += 1
            if reads[threading.get_ident()] == 2:
                met.wait(60)  # two threads hold a source of their first module each, or it breaks
            alive = {name for name, tensor in list(held) if tensor() is not None and name != module}
            most.append(1 + len(alive))
            found = read(self, module)
            assert found is not None
            held.append((module, weakref.ref(found.A)))
            return found

        one = merge(alike, tmp_path / "one", method, seed=3)
        monkeypatch.setattr(Source, "weights", watched)
        threads, steps = torch.get_num_threads(), list[int]()
        two = merge(alike, tmp_path / "two", method, seed=3, at_once=2, on_module=lambda done, of: steps.append(done))
        assert steps == list(range(1, 22)) and list(one.norms) == list(two.norms) and max(most) == 2
        first, second = dense(tmp_path / "one"), dense(tmp_path / "two")
        assert list(first) == list(second)
        assert all(distance(second[name], first[name]) < 1e-5 for name in first)
        assert torch.get_num_threads() == threads

    def test_one_of_several_at_once_that_is_not_finite(self, alike: dict[str, Path], tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        with pytest.raises(NonFiniteError):
            merge(alike, tmp_path / "made", "svd", weights=[1e39, 1.0, 1.0], at_once=2)
        assert not (tmp_path / "made").exists() and torch.get_num_threads() == threads

    def test_weights_left_out_are_equal(self, alike: dict[str, Path], tmp_path: Path) -> None:
        merge(alike, tmp_path / "one")
        merge(alike, tmp_path / "two", weights=[1 / 3] * 3)
        assert written(tmp_path / "one") == written(tmp_path / "two")

    @pytest.mark.parametrize("method", [method for method in ALL if method.startswith("dare")])
    def test_a_seed_is_a_result(self, base: Any, alike: dict[str, Path], tmp_path: Path, method: Method) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        merge(alike, tmp_path / "one", method, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        merge(alike, tmp_path / "two", method, seed=3)
        merge(alike, tmp_path / "other", method, seed=4)
        assert written(tmp_path / "one") == written(tmp_path / "two") != written(tmp_path / "other")
        # A module's result does not hang on those before it.
        for name, path in alike.items():
            keep_only(path, tmp_path / f"less-{name}", "layers.2")
        merge({name: tmp_path / f"less-{name}" for name in alike}, tmp_path / "less", method, seed=3)
        whole, less = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "less"))
        assert len(less) == len(whole) / 3 and all(torch.equal(whole[name], less[name]) for name in less)

    @pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "knots", "linear"])
    def test_one_module_is_held_at_a_time(
        self, alike: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
    ) -> None:
        read = Source.weights
        held: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        loads: list[weakref.ref[torch.Tensor]] = []
        load = Adapter.load

        def watched(self: Source, module: str) -> LoRAWeights | None:
            assert not [name for name, tensor in held if tensor() is not None and name != module]
            found = read(self, module)
            assert found is not None
            held.extend((module, weakref.ref(tensor)) for tensor in (found.A, found.B))
            return found

        def loaded(path: Path) -> Adapter:
            assert not [tensor for tensor in loads if tensor() is not None]
            adapter = load(path)
            loads.extend(weakref.ref(tensor) for own in adapter.modules.values() for tensor in (own.A, own.B))
            return adapter

        monkeypatch.setattr(Source, "weights", watched)
        monkeypatch.setattr(Adapter, "load", loaded)
        steps: list[tuple[int, int]] = []
        merge(alike, tmp_path / "made", method, on_module=lambda done, of: steps.append((done, of)))
        assert len(held) == 21 * 3 * 2 == len(loads)
        assert steps == [(done, 21) for done in range(1, 22)]

    def test_how_it_was_made_is_written_beside_it(self, alike: dict[str, Path], tmp_path: Path) -> None:
        merge(alike, tmp_path / "made", "dare_ties", weights=[1, 2, 3], density=0.7, seed=5)
        assert json.loads((tmp_path / "made" / "generated.json").read_text()) == {
            "made_from": "merge", "method": "dare_ties", "density": 0.7, "rank": None, "seed": 5,
            "adapters": [{"name": "a", "weight": 1}, {"name": "b", "weight": 2}, {"name": "c", "weight": 3}],
        }  # fmt: skip


def peft_merge(
    base: Any, adapters: dict[str, Path], weights: Sequence[float], method: str, density: float | None, rank: int
) -> dict[str, torch.Tensor]:
    """The deltas that PEFT's own merge acts with."""
    names = list(adapters)
    model = PeftModel.from_pretrained(copy.deepcopy(base), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    more = {"svd_rank": rank} if method.endswith("svd") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, list(weights), "all", combination_type=method, density=density, **more)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("all").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def written(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def keep_only(path: Path, out: Path, part: str) -> None:
    tensors = {name: one for name, one in load_file(path / "adapter_model.safetensors").items() if part in name}
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((path / "adapter_config.json").read_text())


def rename_base(path: Path, out: Path, name: str | None) -> Path:
    keep_only(path, out, "")
    config = json.loads((path / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    return out


class TestBadInput:
    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"method": "average"}, "no merge 'average': choose from cat, svd"),
            ({"weights": [0.5, 0.5]}, "3 adapters need as many weights, not 2"),
            ({"weights": []}, "3 adapters need as many weights, not 0"),
            ({"weights": [0.5, math.nan, 1]}, "finite numbers, .* 0.5, nan, 1"),
            ({"weights": [0.5, math.inf, 1]}, "finite numbers"),
            ({"weights": [0, 0.0, -0.0]}, "not all of them 0"),
            ({"density": 0.0}, "density .* not 0.0"),
            ({"density": -0.1}, "density"),
            ({"density": 1.01}, "density"),
            ({"density": math.nan}, "density"),
            ({"method": "svd", "rank": 0}, "rank is 1 or more, not 0"),
            ({"method": "cat", "rank": 4}, "rank of 'cat' follows .* use 'svd'"),
            ({"method": "linear", "rank": 4}, "use 'svd'"),
            ({"method": "dare_ties", "rank": 4}, "use 'dare_ties_svd'"),
        ],
    )
    def test_settings(self, alike: dict[str, Path], tmp_path: Path, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            merge(alike, tmp_path / "made", **settings)
        assert not list(tmp_path.iterdir())

    def test_too_few(self, alike: dict[str, Path], tmp_path: Path) -> None:
        for adapters in ({}, {"a": alike["a"]}):
            with pytest.raises(ConfigError, match=f"two adapters or more, not {len(adapters)}"):
                merge(adapters, tmp_path / "made")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("method", OF_FACTORS)
    def test_ranks_that_differ(self, kinds: dict[str, Path], tmp_path: Path, method: Method) -> None:
        way = "svd" if method == "linear" else f"{method}_svd"
        says = rf"'{method}' needs adapters of one rank, and in \S+ even has 4 and root 8: use '{way}'"
        with pytest.raises(ConfigError, match=says):
            merge(kinds, tmp_path / "made", method)
        assert not list(tmp_path.iterdir())

    def test_bases_of_other_names(self, alike: dict[str, Path], tmp_path: Path) -> None:
        one = rename_base(alike["a"], tmp_path / "one", "some/Base")
        same = rename_base(alike["b"], tmp_path / "same", "/models/base")
        other = rename_base(alike["c"], tmp_path / "other", "some/other")
        nameless = rename_base(alike["c"], tmp_path / "nameless", None)
        with pytest.raises(AdapterMismatchError, match=r"one for some/Base, and other for some/other"):
            merge({"nameless": nameless, "one": one, "other": other}, tmp_path / "made")
        assert not (tmp_path / "made").exists()
        merge({"nameless": nameless, "one": one, "same": same}, tmp_path / "made")
        assert Adapter.load(tmp_path / "made").config["base_model_name_or_path"] == "some/Base"

    def test_bases_of_other_sizes(self, alike: dict[str, Path], tmp_path: Path) -> None:
        keep_only(alike["a"], tmp_path / "wide", "")
        file = tmp_path / "wide" / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 40)}, file)
        with pytest.raises(AdapterMismatchError, match=rf"a maps 32 to 32 features in {Q}, and wide 40 to 32"):
            merge({"a": alike["a"], "wide": tmp_path / "wide"}, tmp_path / "made")
        assert not (tmp_path / "made").exists()

    def test_an_adapter_that_is_not_there(self, alike: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(AdapterNotFoundError):
            merge({"a": alike["a"], "b": tmp_path / "none"}, tmp_path / "made")
        assert not list(tmp_path.iterdir())

    def test_a_place_that_is_taken(self, alike: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        with pytest.raises(AdapterError, match="exists already: choose another folder"):
            merge(alike, tmp_path / "made")
        assert not list((tmp_path / "made").iterdir())

    @pytest.mark.parametrize("method", ALL)
    @pytest.mark.parametrize("weight", [1e38, 1e300], ids=str)
    def test_a_sum_that_is_not_finite(
        self, alike: dict[str, Path], tmp_path: Path, method: Method, weight: float
    ) -> None:
        with pytest.raises(NonFiniteError):
            merge(alike, tmp_path / "made", method, weights=[weight] * 3, dtype=torch.float16)
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run() -> Callable[..., Any]:
    app = typer.Typer()
    app.command()(command)

    def call(*line: Any) -> Any:
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(word) for word in line])

    return call


class TestCommand:
    def test_knows_every_method(self) -> None:
        assert get_args(get_args(inspect.signature(command).parameters["method"].annotation)[0]) == ALL

    def test_as_json(self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path) -> None:
        out = tmp_path / "made"
        line = [*alike.values(), "--method", "ties", "--density", ".6", "--out", out, "--json"]
        found = run(*line, "--weights", ".5,.3,-.2")
        assert found.exit_code == 0, found.output
        told = json.loads(found.stdout)
        report = merge(
            {str(path): path for path in alike.values()}, tmp_path / "same", "ties", weights=[0.5, 0.3, -0.2],
            density=0.6,
        )  # fmt: skip
        assert written(out) == written(tmp_path / "same")
        assert told["folder"] == str(out) and told["method"] == "ties" and told["filled"] == {}
        assert told["error"] == pytest.approx(report.error) and told["errors"] == pytest.approx(report.errors)
        assert told["bytes"] == report.bytes and set(told["ranks"].values()) == {4}
        layer = [error for name, error in report.errors.items() if ".layers.1." in name]
        assert list(told["layers"]) == ["0", "1", "2"] and told["layers"]["1"] == pytest.approx(sum(layer) / len(layer))

    def test_as_text(self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path) -> None:
        line = [*alike.values(), "-w", "1", "-w", "1", "-w", "1"]
        exact = run(*line, "--out", tmp_path / "exact")
        assert exact.exit_code == 0, exact.output
        assert "cat is exact" in exact.stdout and "layer" not in exact.stdout and "lost" not in exact.stdout
        assert f"{tmp_path / 'exact'}: 21 modules, rank 12, " in exact.stdout
        close = run(*line, "--method", "svd", "--rank", 11, "--out", tmp_path / "close")
        rows = [row.split() for row in close.stdout.splitlines()]
        assert [row[0] for row in rows[:5]] == ["layer", "0", "1", "2", "all"]
        assert all(0 < float(row[1]) < 0.5 for row in rows[1:5])
        assert "lost" not in close.stdout
        far = run(*line, "--method", "svd", "--rank", 1, "--out", tmp_path / "far")
        assert "Most of what these adapters do is lost: route between them or use cat." in far.stdout

    def test_says_what_counted_as_zero(self, run: Callable[..., Any], base: Any, tmp_path: Path) -> None:
        few = [write_adapter(base, tmp_path / name, 1, target_modules=[f"{name}_proj"]) for name in "qv"]
        found = run(*few, "--out", tmp_path / "made")
        assert f"{few[0]} has nothing in 3 modules and counted as zero there." in found.stdout

    @pytest.mark.parametrize(
        "weights",
        [
            ["--weights", ".5,.3,-.2"],
            ["--weights", " .5 .3, -.2 "],
            ["--weights", ".5 .3", "-w", "-.2"],
            ["-w", ".5", "-w", ".3", "-w", "-.2"],
        ],
    )
    def test_weights_are_read(
        self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path, weights: list[str]
    ) -> None:
        found = run(*alike.values(), *weights, "--out", tmp_path / "made")
        assert found.exit_code == 0, found.output
        told = json.loads((tmp_path / "made" / "generated.json").read_text())
        assert [one["weight"] for one in told["adapters"]] == [0.5, 0.3, -0.2]

    def test_numbers_that_are_apart_are_weights_too(
        self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path
    ) -> None:
        line = ["--weights", ".5", ".3", ".2", "--method", "ties", "--density", ".5", "--out"]
        assert run(*alike.values(), *line, tmp_path / "made").exit_code == 0
        told = json.loads((tmp_path / "made" / "generated.json").read_text())
        assert [one["weight"] for one in told["adapters"]] == [0.5, 0.3, 0.2]

    @pytest.mark.parametrize(
        "more, says",
        [
            (["--weights", ".5,x,.2"], "'x' is no weight"),
            (["--method", "average"], "average"),
            (["--density", "much"], "--density"),
        ],
    )
    def test_what_cannot_be_read(
        self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path, more: list[str], says: str
    ) -> None:
        found = run(*alike.values(), *more, "--out", tmp_path / "made")
        assert found.exit_code == 2 and says in found.output
        assert not list(tmp_path.iterdir())

    def test_what_does_not_fit(self, run: Callable[..., Any], alike: dict[str, Path], tmp_path: Path) -> None:
        twice = run(alike["a"], alike["a"], "--out", tmp_path / "made")
        assert twice.exit_code == 2 and "is given twice" in " ".join(twice.output.split())
        assert run(*alike.values()).exit_code == 2  # no --out
        few = run(*alike.values(), "--weights", ".5,.3", "--out", tmp_path / "made")
        assert isinstance(few.exception, ConfigError)
        assert not list(tmp_path.iterdir())
        assert isinstance(run(*alike.values(), "--out", alike["a"]).exception, AdapterError)
