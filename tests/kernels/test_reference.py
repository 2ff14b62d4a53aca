"""The plain product against a float64 loop over (token, slot) pairs, forward and backward."""

import pytest
import torch

from molora_kernels import Dispatch, Factors, add_lora, dispatch
from tests.conftest import DEVICE
from tests.kernels.plans import KINDS, SLOTS, make_slots

IN, OUT = 24, 20  # different, and multiples of no tile
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value
RANKS = {"1": [1] * SLOTS, "8": [8] * SLOTS, "16": [16] * SLOTS, "64": [64] * SLOTS, "mixed": [1, 8, 16, 64, 3, 5]}


class Case:
    """Inputs of one dtype and their float64 copies, all leaves."""

    def __init__(self, kind: str, T: int, ranks: list[int], dtype: torch.dtype = torch.float32, S: int = 2) -> None:
        generator = torch.Generator().manual_seed(7)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.slots = make_slots(kind, T, S)
        self.x, self.y = tensor(T, IN), tensor(T, OUT)
        self.factors = {s: Factors(tensor(r, IN) / IN**0.5, tensor(r, OUT) / r**0.5) for s, r in enumerate(ranks)}
        self.weights = torch.rand(T, S, generator=generator).to(DEVICE) + 0.5

    def plan(self, **known: bool) -> Dispatch:
        return dispatch(self.slots, self.weights, **known)

    def double(self) -> "Case":
        twin = object.__new__(Case)
        twin.slots, twin.weights = self.slots, self.weights.detach().double()
        twin.x, twin.y = self.x.detach().double(), self.y.detach().double()
        twin.factors = {s: Factors(f.A.detach().double(), f.B.detach().double()) for s, f in self.factors.items()}
        return twin

    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.y, self.weights, *(t for pair in self.factors.values() for t in pair)]

    def needs_grad(self) -> "Case":
        for leaf in self.leaves():
            leaf.requires_grad_()
        return self


def loop(case: Case, unit: bool = False) -> torch.Tensor:
    """y[t] + sum of w x[t] A^T B, one pair at a time."""
    rows = []
    for t, slots in enumerate(case.slots.tolist()):
        row = case.y[t]
        for column, slot in enumerate(slots):
            if slot in case.factors:
                A, B = case.factors[slot]
                delta = case.x[t] @ A.T @ B
                row = row + (delta if unit else case.weights[t, column] * delta)
        rows.append(row)
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp_min(1e-9)


@pytest.mark.parametrize("T", [1, 7, 63, 133])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_loop(kind: str, T: int) -> None:
    case = Case(kind, T, RANKS["mixed"])
    expected = loop(case.double())
    close(add_lora(case.y, case.x, case.factors, case.plan()), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@torch.no_grad()
def test_every_rank_and_dtype(ranks: str, dtype: torch.dtype) -> None:
    case = Case("zipf", 63, RANKS[ranks], dtype)
    expected = loop(case.double())
    close(add_lora(case.y, case.x, case.factors, case.plan()), expected, dtype)


@torch.no_grad()
def test_unit_weights_are_ones() -> None:
    case = Case("uniform", 63, RANKS["mixed"])
    expected = loop(case.double(), unit=True)
    close(add_lora(case.y, case.x, case.factors, case.plan(unit=True)), expected)


@torch.no_grad()
def test_the_same_on_every_token() -> None:
    case = Case("identical", 63, RANKS["mixed"])
    expected = loop(case.double())
    close(add_lora(case.y.clone(), case.x, case.factors, case.plan()), expected)
    close(add_lora(case.y, case.x, case.factors, case.plan(uniform=True)), expected)


@torch.no_grad()
def test_a_slot_without_factors_adds_nothing() -> None:
    case = Case("distinct", 63, RANKS["mixed"])
    del case.factors[1], case.factors[4]
    expected = loop(case.double())
    close(add_lora(case.y.clone(), case.x, case.factors, case.plan()), expected)
    before = case.y.clone()
    assert torch.equal(add_lora(case.y, case.x, {}, case.plan()), before)


@torch.no_grad()
def test_nothing_acts_nothing_changes() -> None:
    case = Case("all -1", 63, RANKS["8"])
    before = case.y.clone()
    assert torch.equal(add_lora(case.y, case.x, case.factors, case.plan()), before)


@pytest.mark.parametrize("kind", ["identical", "zipf", "empty slots"])
def test_in_place_is_out_of_place(kind: str) -> None:
    case = Case(kind, 63, RANKS["mixed"])
    y = case.y.clone().requires_grad_()
    outside = add_lora(y, case.x, case.factors, case.plan())
    assert torch.equal(y, case.y)
    with torch.no_grad():
        inside = add_lora(case.y, case.x, case.factors, case.plan())
    assert inside.data_ptr() == case.y.data_ptr()
    close(inside, outside.detach().double())


@torch.no_grad()
def test_a_repeated_run_is_bitwise_equal() -> None:
    first, second = Case("zipf", 133, RANKS["mixed"]), Case("zipf", 133, RANKS["mixed"])
    a, b = (add_lora(case.y, case.x, case.factors, case.plan()) for case in (first, second))
    assert torch.equal(a, b)


@pytest.mark.parametrize("T", [1, 7, 133])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_loops(kind: str, T: int) -> None:
    case = Case(kind, T, RANKS["mixed"])
    reference = case.double().needs_grad()
    case.needs_grad()
    out, expected = add_lora(case.y, case.x, case.factors, case.plan()), loop(reference)
    close(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    out.backward(upstream)
    expected.backward(upstream.double())
    for found, wanted in zip(case.leaves(), reference.leaves(), strict=True):
        if wanted.grad is None or found.grad is None:  # a slot that acts nowhere
            assert wanted.grad is None and found.grad is None
        else:
            close(found.grad, wanted.grad)


def test_only_the_weights_need_a_gradient() -> None:
    """What training a router does: base output and factors are frozen."""
    case = Case("zipf", 63, RANKS["8"])
    reference = case.double()
    for one in (case, reference):
        one.weights.requires_grad_()
    add_lora(case.y, case.x, case.factors, case.plan()).square().sum().backward()
    loop(reference).square().sum().backward()
    close(case.weights.grad, reference.weights.grad)
