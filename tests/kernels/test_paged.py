"""The Triton kernels over rank pages against a float64 loop over pairs, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch

from molora_kernels import Factors
from molora_kernels.blocks import BLOCK, Blocks, make_blocks
from molora_kernels.forms import BY_TOKEN, TOGETHER
from molora_kernels.order import PagedPlan, order_by_slot
from molora_kernels.paged import add_lora_paged, expand_paged, passes, shrink_paged
from molora_kernels.pages import PAGE, RankPages
from tests.conftest import DEVICE
from tests.kernels.plans import KINDS, SLOTS, make_slots

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # relative, of the norm
RANKS = {"1": [1] * SLOTS, "8": [8] * SLOTS, "16": [16] * SLOTS, "64": [64] * SLOTS, "mixed": [1, 8, 16, 64, 3, 37]}
FORMS: dict[str, dict[str, bool]] = {
    "token": {"by_token": True},
    "block": {"by_token": False, "hot_set": False},
    "hot": {"by_token": False, "hot_set": True},
}


class Case:
    """A group of modules, its adapters and inputs; y and what no adapter owns are no zeros."""

    def __init__(
        self,
        kind: str = "zipf",
        T: int = 7,
        ranks: list[int] = RANKS["mixed"],
        dtype: torch.dtype = torch.float32,
        D: int = 100,
        outputs: tuple[int, ...] = (100, 24, 40),
        S: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.outputs, self.dtype = outputs, dtype
        self.slots = make_slots(kind, T, S)
        self.x, self.y = tensor(T, D), tensor(T, sum(outputs))
        self.weights = (torch.rand(T, S, generator=generator) + 0.5).to(DEVICE)
        self.factors = [
            [Factors(tensor(r, D) / D**0.5, tensor(r, wide) / r**0.5) for wide in outputs] for r in ranks
        ]  # [slot][slice]
        self.pages = RankPages(D, outputs, SLOTS, 40, 64, dtype, DEVICE)
        self.pages.A.fill_(torch.nan)  # what was never written must never be read
        self.pages.B.fill_(torch.nan)
        for slot, pairs in enumerate(self.factors):
            self.pages.put(slot, pairs)

    def run(self, form: str, blocks: Blocks | None = None) -> torch.Tensor:
        return add_lora_paged(self.y.clone(), self.x, self.pages, self.slots, self.weights, blocks, **FORMS[form])

    def expected(self) -> torch.Tensor:
        rows = []
        for t, slots in enumerate(self.slots.tolist()):
            row = self.y[t].double()
            for k, slot in enumerate(slots):
                if slot >= 0:
                    x = self.x[t].double()
                    parts = [x @ A.double().T @ B.double() for A, B in self.factors[slot]]
                    row = row + self.weights[t, k].double() * torch.cat(parts)
            rows.append(row)
        return torch.stack(rows)

    def check(self, found: torch.Tensor) -> None:
        expected = self.expected()
        assert found.dtype == self.dtype and torch.isfinite(found).all()
        error = (found.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[self.dtype]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is handed out unwritten holds NaN, or the largest number."""
    empty = torch.empty

    def poisoned(*size: int, **how: Any) -> torch.Tensor:
        made = empty(*size, **how)
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 7, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loop(kind: str, T: int, form: str) -> None:
    case = Case(kind, T)
    case.check(case.run(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_and_dtype(ranks: str, dtype: torch.dtype, form: str) -> None:
    case = Case(ranks=RANKS[ranks], dtype=dtype)
    case.check(case.run(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [
        {"D": 1024, "outputs": (48,)},  # long enough that the sum over D is split
        {"outputs": (300, 17)},  # several blocks of the output, the last one ragged
        {"S": 1},
        {"S": 3},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, int], form: str) -> None:
    case = Case(T=9, **shape)
    case.check(case.run(form))


@pytest.mark.parametrize("form", FORMS)
def test_what_nothing_reaches_stays_bit_for_bit(form: str) -> None:
    case = Case("uniform", 33)
    case.slots[::2] = -1
    found = case.run(form)
    assert torch.equal(found[::2], case.y[::2])
    assert not torch.equal(found[1::2], case.y[1::2])
    case.check(found)


@pytest.mark.parametrize("form", FORMS)
def test_a_slice_that_an_adapter_leaves_alone(form: str) -> None:
    case = Case("identical", 7)
    pair = case.factors[2]
    case.pages.put(2, [pair[0], None, None])
    case.pages.clear(4)
    found = case.run(form)
    assert torch.equal(found[:, 100:], case.y[:, 100:])
    assert not torch.equal(found[:, :100], case.y[:, :100])


@pytest.mark.parametrize("form", FORMS)
def test_a_repeated_run_is_bitwise_equal(form: str) -> None:
    case = Case("zipf", 70)
    assert torch.equal(case.run(form), case.run(form))


def test_any_order_is_right() -> None:
    case = Case("zipf", 70)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    case.check(case.run("block", make_blocks(case.slots, order)))
    with pytest.raises(ValueError, match="blocks are of"):
        case.run("block", make_blocks(case.slots[:5], order[:5].argsort()))


@pytest.mark.parametrize("form", FORMS)
def test_narrow_integers_and_rows_with_gaps(form: str) -> None:
    case = Case("zipf", 7)
    expected = case.run(form)
    case.slots = case.slots.int()
    case.x = torch.cat([case.x, case.x], 1)[:, :100]
    assert not case.x.is_contiguous()
    assert torch.equal(case.run(form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_swap_writes_where_the_old_one_was(form: str) -> None:
    case = Case("identical", 7, ranks=[16] * SLOTS)
    addresses = [t.data_ptr() for t in (case.pages.A, case.pages.B, case.pages.first, case.pages.count)]
    case.check(case.run(form))
    for rank in (3, 64, 16):
        generator = torch.Generator().manual_seed(rank)
        new = [
            Factors(*(torch.randn(rank, w, generator=generator).to(DEVICE) / 10 for w in (100, wide)))
            for wide in case.outputs
        ]
        case.pages.put(2, new)
        case.factors[2] = new
        case.check(case.run(form))
    assert addresses == [t.data_ptr() for t in (case.pages.A, case.pages.B, case.pages.first, case.pages.count)]


def test_tokens_are_ordered_by_their_slots() -> None:
    slots = make_slots("zipf", 133, 3)
    rows = [sorted(row) for row in slots[order_by_slot(slots)].tolist()]
    assert rows == sorted(map(sorted, slots.tolist()))


@pytest.mark.parametrize("S", [1, 2, 3, 6])
@pytest.mark.parametrize("T", [1, 63, 133])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_list_each_slot_once(kind: str, T: int, S: int) -> None:
    slots = make_slots(kind, T, S)
    blocks = make_blocks(slots, order_by_slot(slots))
    assert blocks.order is not None and len(blocks.counts) == -(-T // BLOCK)
    for order, found, count in zip(blocks.order.split(BLOCK), blocks.lists, blocks.counts.tolist(), strict=True):
        expected = set(slots[order].flatten().tolist()) - {-1}
        assert count == len(expected) and set(found[:count].tolist()) == expected


@pytest.mark.parametrize("ranks", RANKS)
def test_one_column(ranks: str) -> None:
    case = Case("zipf", 70, ranks=RANKS[ranks], S=1)
    case.check(case.run("block"))


@pytest.mark.parametrize("form", FORMS)
def test_aligned_slices(form: str) -> None:
    case = Case("zipf", 70, D=96, outputs=(96, 32, 48))
    case.check(case.run(form))


def test_pages_are_reused_and_run_out() -> None:
    pages = RankPages(8, (4,), slots=3, pages=4, max_rank=48, dtype=torch.float32, device=DEVICE)

    def adapter(rank: int) -> list[Factors | None]:
        return [Factors(torch.full((rank, 8), float(rank)), torch.full((rank, 4), float(rank)))]

    pages.put(0, adapter(16))
    pages.put(1, adapter(33))
    with pytest.raises(MemoryError, match="4 serve 2"):
        pages.put(2, adapter(1))
    pages.put(0, adapter(5))  # over itself
    pages.clear(1)
    pages.put(2, adapter(48))
    assert sorted(pages.factors(0)) == [0, 2]
    A = pages.factors(0)[0].A
    assert A.shape == (PAGE, 8) and (A[:5] == 5).all() and (A[5:] == 0).all()


@pytest.mark.parametrize(
    ("slot", "shapes", "error", "words"),
    [
        (3, ((4, 8), (4, 4)), IndexError, "slots are 0 to 2"),
        (0, ((4, 9), (4, 4)), ValueError, "takes A"),
        (0, ((4, 8), (5, 4)), ValueError, "takes A"),
        (0, ((40, 8), (40, 4)), ValueError, "ranks up to 32"),
    ],
)
def test_what_does_not_fit_is_refused(slot: int, shapes: tuple, error: type[Exception], words: str) -> None:
    pages = RankPages(8, (4,), slots=3, pages=4, max_rank=32, dtype=torch.float32, device=DEVICE)
    with pytest.raises(error, match=words):
        pages.put(slot, [Factors(*(torch.ones(shape) for shape in shapes))])
    assert not pages.count.any() and not pages.A.any()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x", lambda x: x[:, :-1], "x must be"),
        ("x", lambda x: x.double(), "x must be torch.float32"),
        ("x", lambda x: x.T.contiguous().T, "contiguous rows"),
        ("y", lambda y: y[:-1], "y must be"),
        ("slots", lambda s: s.float(), "slots must be"),
        ("weights", lambda w: w.half(), "weights must be"),
        ("weights", lambda w: w.to("meta"), "is on meta"),
    ],
)
def test_tensors_of_another_kind_are_refused(name: str, change: object, words: str) -> None:
    case = Case()
    setattr(case, name, change(getattr(case, name)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        add_lora_paged(case.y, case.x, case.pages, case.slots, case.weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["zipf", "identical", "all -1"])
@pytest.mark.parametrize("T", [1, 70])
def test_gradients_are_the_loops(kind: str, T: int, form: str) -> None:
    case = Case(kind, T)
    if form == "hot":  # with gradients its products are of all ranks
        case.pages.A.nan_to_num_(0.0)
        case.pages.B.nan_to_num_(0.0)
    upstream = torch.randn(case.y.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    leaves = [case.y, case.x, case.weights]
    for leaf in leaves:
        leaf.requires_grad_()
    case.run(form).backward(upstream)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    case.expected().backward(upstream.double())
    assert len(found) == 3
    for grad, leaf in zip(found, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_frozen_base_gives_the_weights_their_gradient() -> None:
    """What training a router does: only the weights need one."""
    case = Case("zipf", 9)
    case.weights.requires_grad_()
    case.run("token").square().sum().backward()
    found = case.weights.grad.clone()
    case.weights.grad = None
    case.expected().square().sum().backward()
    assert (found - case.weights.grad).norm() <= 1e-5 * case.weights.grad.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["zipf", "empty slots"])
def test_gradients_of_the_factors_are_the_loops(kind: str, form: str) -> None:
    case = Case(kind, 70)
    case.pages.A.nan_to_num_(0.0).requires_grad_()
    case.pages.B.nan_to_num_(0.0).requires_grad_()
    upstream = torch.randn(case.y.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    case.run(form).backward(upstream)
    found = {name: getattr(case.pages, name).grad for name in "AB"}
    leaves = [factor.requires_grad_() for pairs in case.factors for pair in pairs for factor in pair]
    case.expected().backward(upstream.double())
    owned = {"A": torch.zeros_like(found["A"], dtype=torch.bool), "B": torch.zeros_like(found["B"], dtype=torch.bool)}
    for slot, pairs in enumerate(case.factors):
        for index, (A, B) in enumerate(pairs):
            first = int(case.pages.first[index, slot]) * PAGE
            rows = slice(first, first + len(A))
            for name, grad, mine, leaf in (
                ("A", found["A"][index], owned["A"][index], A),
                ("B", case.pages.b_slice(index, found["B"]), case.pages.b_slice(index, owned["B"]), B),
            ):
                wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                got = grad.flatten(0, 1)[rows]
                assert (got - wanted).norm() <= 1e-5 * wanted.norm(), (name, slot, index)
                mine.flatten(0, 1)[rows] = True
    assert len(leaves) == 2 * 3 * SLOTS
    for name, grad in found.items():  # what no adapter owns stays where it is
        assert not grad[~owned[name]].any()


@pytest.mark.parametrize(("tokens", "adapters"), [(BY_TOKEN + 6, TOGETHER + 1), (BY_TOKEN + 6, 6), (7, 20)])
def test_passes_are_the_loop(tokens: int, adapters: int) -> None:
    case = Case("uniform", tokens, RANKS["16"], D=32, outputs=(16, 24), S=2)
    pages = RankPages(32, case.outputs, adapters, 40, 16, case.dtype, DEVICE)
    for slot, pairs in enumerate(case.factors):
        pages.put(slot, pairs)
    plan = PagedPlan(case.slots.int(), case.weights)
    parts = passes(plan, pages)
    assert len(parts) == (2 if tokens > BY_TOKEN and adapters > TOGETHER else 1)
    y = case.y.clone()
    for part in parts:
        expand_paged(y, shrink_paged(case.x, pages, part), pages, part)
    case.check(y)
