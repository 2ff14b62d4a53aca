"""MegaBlocks' permutations around a grouped GEMM against a float64 loop; the stand-ins for its compiled part always.

With MegaBlocks installed all of it runs, in Triton's interpreter or on a GPU.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from molora_kernels import Factors, megablocks
from molora_kernels.megablocks import FactorStack, add_lora_megablocks, pair_order, stack_factors, stand_ins
from tests.conftest import DEVICE
from tests.kernels.plans import KINDS, SLOTS, make_slots

needs_megablocks = pytest.mark.skipif(
    find_spec("megablocks") is None, reason="MegaBlocks is optional and is not installed"
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative, of the norm
MIXED = [1, 8, 16, 64, 3, 37]


class Case:
    """Adapters of one module and inputs; y and what no adapter owns are no zeros."""

    def __init__(
        self,
        kind: str = "zipf",
        T: int = 7,
        ranks: list[int] = MIXED,
        dtype: torch.dtype = torch.float32,
        D: int = 48,
        width: int = 32,
        S: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.dtype, self.slots = dtype, make_slots(kind, T, S)
        self.x, self.y = tensor(T, D), tensor(T, width)
        self.weights = (torch.rand(T, S, generator=generator) + 0.5).to(DEVICE)
        self.factors = {slot: Factors(tensor(r, D) / D**0.5, tensor(r, width) / r**0.5) for slot, r in enumerate(ranks)}

    def run(self, **replaced: Any) -> torch.Tensor:
        case = {**self.__dict__, **replaced}
        stack = stack_factors(case["factors"])
        order = pair_order(case["slots"], len(stack.A) - 1)
        return add_lora_megablocks(case["y"].clone(), case["x"], case["weights"], stack, order)

    def expected(self, **replaced: Any) -> torch.Tensor:
        """In float64, a pair at a time."""
        case = {**self.__dict__, **replaced}
        rows = []
        for t, slots in enumerate(case["slots"].tolist()):
            row = case["y"][t].double()
            for k, slot in enumerate(slots):
                if slot in case["factors"]:
                    A, B = case["factors"][slot]
                    row = row + case["weights"][t, k].double() * (case["x"][t].double() @ A.double().T @ B.double())
            rows.append(row)
        return torch.stack(rows)

    def check(self, found: torch.Tensor, expected: torch.Tensor | None = None) -> None:
        expected = self.expected() if expected is None else expected
        assert torch.isfinite(found).all()
        assert (found.double() - expected).norm() <= TOLERANCE[self.dtype] * expected.norm()


# The stand-ins, with and without MegaBlocks.


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_sort_is_stable_and_by_the_lowest_bits(dtype: torch.dtype) -> None:
    x = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    values, positions = torch.empty_like(x), torch.empty_like(x)
    for bits in (4, 15):
        stand_ins().sort(x, bits, values, positions)
        expected, at = x.sort(stable=True)
        assert torch.equal(values, expected) and torch.equal(positions.long(), at)
    stand_ins().sort(x, 2, values, positions)
    assert torch.equal(values, x[(x % 4).sort(stable=True).indices])
    stand_ins().sort(-x, torch.iinfo(dtype).bits, values, positions)
    assert torch.equal(values, (-x).sort().values)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_histogram_counts_what_lies_in_its_bins(dtype: torch.dtype) -> None:
    x = torch.randint(-3, 12, (4, 100), generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    expected = torch.stack([torch.histc(row.double(), bins=9, min=-0.5, max=8.5) for row in x])
    found = stand_ins().histogram(x, 9)
    assert found.dtype == torch.int32 and torch.equal(found.double(), expected)
    assert torch.equal(stand_ins().histogram(x[0], 9).double(), expected[0])
    assert torch.equal(stand_ins().histogram(x[0, :0], 9), torch.zeros(9, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_cumsums(dtype: torch.dtype) -> None:
    x = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    out = torch.empty_like(x)
    stand_ins().inclusive_cumsum(x, 1, out)
    assert torch.equal(out.long(), x.long().cumsum(1))
    stand_ins().exclusive_cumsum(x, 1, out)
    assert not out[:, 0].any() and torch.equal(out[:, 1:].long(), x.long().cumsum(1)[:, :-1])


def test_without_megablocks_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"not installed(.|\n)*1\. pip install(.|\n)*2\. pip install --no-deps"):
        megablocks.load.__wrapped__()
    assert "megablocks_ops" not in sys.modules


def test_a_megablocks_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks, "find_spec", lambda _: True)
    for name in ("megablocks", "megablocks.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="MegaBlocks cannot be imported: .*megablocks"):
        megablocks.load.__wrapped__()
    assert "megablocks_ops" not in sys.modules


def test_the_compiled_part_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that looks like MegaBlocks, with a compiled part and a grouped GEMM."""
    names = ("megablocks", "megablocks.ops", "megablocks.grouped_gemm_util", "megablocks.backend.kernels")
    package, ops, grouped, kernels = map(ModuleType, names)
    compiled = ModuleType("megablocks_ops")
    compiled.__spec__ = find_spec("json")
    grouped.grouped_gemm_is_available = lambda: True  # type: ignore[attr-defined]
    grouped.ops = ModuleType("ops")  # type: ignore[attr-defined]
    grouped.ops.gmm = len  # type: ignore[attr-defined]
    for name, module in zip((*names, "megablocks_ops"), (package, ops, grouped, kernels, compiled), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(megablocks, "find_spec", lambda _: True)
    assert megablocks.load.__wrapped__() == (ops, len)
    assert sys.modules["megablocks_ops"] is compiled


def test_a_stack_holds_every_rank_with_zeros_around_it() -> None:
    case = Case(D=50, width=24)
    del case.factors[1]
    stack = stack_factors(case.factors)
    assert stack.A.shape == (SLOTS + 1, 64, 64) and stack.B.shape == (SLOTS + 1, 64, 32) and stack.outputs == 24
    for slot in range(SLOTS + 1):
        product = torch.zeros(50, 24, device=DEVICE)
        if slot in case.factors:
            product = case.factors[slot].A.T @ case.factors[slot].B
        whole = stack.A[slot] @ stack.B[slot]
        torch.testing.assert_close(whole[:50, :24], product)
        assert not whole[50:].any() and not whole[:, 24:].any()


def test_the_package_grouped_gemm_gets_counts_on_the_host() -> None:
    """The contract of its ``gmm``, which needs a GPU: int64 counts of every group, on the CPU."""
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=DEVICE)
    order = megablocks.PairOrder(ends, ends, ends, 1)
    rows, factors = torch.randn(7, 16, device=DEVICE), torch.randn(4, 16, 16, device=DEVICE)

    def gmm(rows: torch.Tensor, factors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert counts.device.type == "cpu" and counts.dtype == torch.int64
        parts = rows.split(counts.tolist())
        return torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])

    torch.testing.assert_close(
        megablocks._product(rows, factors, order, gmm), megablocks._product(rows, factors, order, None)
    )


# The product, where MegaBlocks is installed.


@needs_megablocks
@pytest.mark.parametrize("T", [1, 7, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loop(kind: str, T: int) -> None:
    case = Case(kind, T)
    case.check(case.run())


@needs_megablocks
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", [[1] * SLOTS, [16] * SLOTS, MIXED], ids=str)
def test_every_rank_and_dtype(ranks: list[int], dtype: torch.dtype) -> None:
    case = Case(T=20, ranks=ranks, dtype=dtype)
    found = case.run()
    assert found.dtype == dtype
    case.check(found)


@needs_megablocks
@pytest.mark.parametrize(
    "shape",
    [
        {"D": 50, "width": 17},  # strides that no grouped GEMM takes
        {"D": 300, "width": 300},  # several blocks of MegaBlocks' copies, the last one ragged
        {"S": 1},
        {"S": 3},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, int]) -> None:
    case = Case(T=9, **shape)
    case.check(case.run())


@needs_megablocks
def test_slots_without_factors_add_nothing() -> None:
    """A hole among the slots, and slots past the last that has factors."""
    case = Case("uniform", 33)
    for slot in (1, 4, 5):
        del case.factors[slot]
    assert (case.slots == 5).any()
    case.check(case.run())


@needs_megablocks
def test_what_nothing_reaches_stays_bit_for_bit() -> None:
    case = Case("uniform", 33)
    case.slots[::2] = -1
    found = case.run()
    assert torch.equal(found[::2], case.y[::2]) and not torch.equal(found[1::2], case.y[1::2])


@needs_megablocks
@pytest.mark.parametrize("T, S", [(0, 2), (5, 0)])
def test_nothing_to_do(T: int, S: int) -> None:
    case = Case("all -1", T, S=S)
    assert torch.equal(case.run(), case.y)


@needs_megablocks
def test_without_a_gradient_it_is_in_place_and_repeats() -> None:
    case, stack = Case(T=20), stack_factors(Case().factors)
    order = pair_order(case.slots, SLOTS)
    first, again = case.y.clone(), case.y.clone()
    assert add_lora_megablocks(first, case.x, case.weights, stack, order) is first
    assert torch.equal(add_lora_megablocks(again, case.x, case.weights, stack, order), first)


@needs_megablocks
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"T": 20},
        {"kind": "distinct", "T": 1},
        {"T": 9, "D": 50, "width": 17},
        {"T": 9, "S": 1},
        {"kind": "empty slots", "T": 20},
    ],
    ids=str,
)
def test_gradients(shape: dict[str, Any], dtype: torch.dtype) -> None:
    """To y, x, weights and every factor, by float64 autograd through the loop."""
    case = Case(dtype=dtype, **shape)
    rows = torch.randn(case.y.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)

    def gradients(run: Any, kind: torch.dtype | None, dy: torch.Tensor) -> list[torch.Tensor]:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(kind or tensor.dtype, copy=True).requires_grad_()

        leaves = {name: leaf(getattr(case, name)) for name in ("y", "x", "weights")}
        factors = {slot: Factors(leaf(A), leaf(B)) for slot, (A, B) in case.factors.items()}
        run(**leaves, factors=factors).backward(dy)
        wanted = [*leaves.values(), *(factor for pair in factors.values() for factor in pair)]
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in wanted]

    found = gradients(case.run, None, rows)
    expected = gradients(case.expected, torch.float64, rows.double())
    assert [grad.dtype for grad in found[:3]] == [dtype, dtype, torch.float32]
    for own, exact in zip(found, expected, strict=True):
        case.check(own, exact)


@needs_megablocks
def test_an_expanded_gradient() -> None:
    """What the backward of a sum hands on: one number for every element."""
    case = Case(T=9)
    x, exact = (case.x.detach().to(kind).requires_grad_() for kind in (torch.float32, torch.float64))
    case.run(x=x).sum().backward()
    case.expected(x=exact).sum().backward()
    assert x.grad is not None and exact.grad is not None
    case.check(x.grad, exact.grad)


@needs_megablocks
def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    stack, order = stack_factors(case.factors), pair_order(case.slots, SLOTS)
    good: dict[str, Any] = {"y": case.y, "x": case.x, "weights": case.weights, "stack": stack, "order": order}
    before = case.y.clone()
    for name, wrong, message in (
        ("x", case.x[:, :20], "do not fit the adapters"),
        ("y", case.y[:, 1:], "do not fit the adapters"),
        ("weights", case.weights.double(), "float32"),
        ("weights", case.weights[:, :1], "float32"),
        ("order", pair_order(case.slots, SLOTS + 1), "another number of slots"),
        ("stack", FactorStack(stack.A[1:], stack.B[1:], stack.outputs), "another number of slots"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora_megablocks(**{**good, name: wrong})
    assert torch.equal(case.y, before)


@needs_megablocks
def test_other_permutations_of_megablocks_run_over_the_stand_ins() -> None:
    """Those with padded bins and with bins of one size, there and back: every pair returns to its token."""
    ops, _ = megablocks.load()
    case = Case("uniform", 12)
    order = pair_order(case.slots, SLOTS)
    counts = ops.histogram(order.slots, SLOTS + 1)
    padded = ops.inclusive_cumsum(ops.round_up(counts, 8), 0)
    at = (order.pairs, order.slots)
    rows = ops.padded_gather(case.x, *at, order.ends, padded, 2)
    assert len(rows) == padded[-1]
    torch.testing.assert_close(ops.padded_scatter(rows, *at, None, order.ends, padded, 2), 2 * case.x)
    bins = ops.binned_gather(case.x, order.pairs, order.ends, int(counts.max()), 2)
    assert bins.shape == (SLOTS + 1, int(counts.max()), case.x.shape[1])
    torch.testing.assert_close(ops.binned_scatter(bins, order.pairs, None, order.ends, 2), 2 * case.x)


@needs_megablocks
def test_stand_ins_are_left_to_nobody() -> None:
    megablocks.load()
    if find_spec("megablocks_ops") is None:
        assert "megablocks_ops" not in sys.modules
