"""The metadata alone: which pairs land in which group, and in which order."""

import pytest
import torch

from molora_kernels import Dispatch, dispatch
from tests.conftest import DEVICE
from tests.kernels.plans import KINDS, make_slots

T_ALL = [1, 7, 63, 133]


def make(kind: str, T: int, **known: bool) -> tuple[torch.Tensor, torch.Tensor, Dispatch]:
    slots = make_slots(kind, T)
    weights = torch.rand(slots.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return slots, weights, dispatch(slots, weights, **known)


def tokens_of(group_tokens: torch.Tensor | None, T: int) -> torch.Tensor:
    return torch.arange(T, device=DEVICE) if group_tokens is None else group_tokens


@pytest.mark.parametrize("T", T_ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_in_its_group_once(kind: str, T: int) -> None:
    slots, weights, plan = make(kind, T)
    rebuilt, found = torch.full_like(slots, -1), torch.zeros_like(weights)
    for group in plan.groups:
        tokens = tokens_of(group.tokens, T)
        columns = (slots[tokens] == group.slot).int().argmax(1)
        assert (rebuilt[tokens, columns] == -1).all()
        rebuilt[tokens, columns] = group.slot
        assert group.weights is not None
        found[tokens, columns] = group.weights
    assert torch.equal(rebuilt, slots)
    assert torch.equal(found, weights * (slots >= 0))


@pytest.mark.parametrize("T", T_ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_order(kind: str, T: int) -> None:
    slots, _, plan = make(kind, T)
    expected = {slot: int((slots == slot).sum()) for slot in slots.unique().tolist() if slot >= 0}
    assert plan.slots == tuple(sorted(expected))
    assert plan.tokens == T
    for group in plan.groups:
        tokens = tokens_of(group.tokens, T)
        assert len(tokens) == expected[group.slot]
        assert (tokens.diff() > 0).all()
    assert plan.everywhere == all(count == T for count in expected.values())


@pytest.mark.parametrize("T", T_ALL)
def test_uniform_is_what_the_sort_finds(T: int) -> None:
    slots = torch.tensor([5, -1, 2], device=DEVICE).expand(T, -1)
    weights = torch.rand(T, 3, device=DEVICE)
    known, sorted_plan = dispatch(slots, weights, uniform=True), dispatch(slots, weights)
    assert known.slots == sorted_plan.slots == (2, 5)
    assert known.everywhere and sorted_plan.everywhere
    for a, b in zip(known.groups, sorted_plan.groups, strict=True):
        assert a.tokens is None and b.tokens is None
        assert a.weights is not None and b.weights is not None and torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("T", T_ALL)
@pytest.mark.parametrize("uniform", [False, True])
def test_unit_plans_carry_no_weights(T: int, uniform: bool) -> None:
    slots = torch.tensor([[1, 0]], device=DEVICE).expand(T, -1)
    plan = dispatch(slots, torch.ones(T, 2, device=DEVICE), uniform=uniform, unit=True)
    assert [group.weights for group in plan.groups] == [None, None]


def test_nothing_acts() -> None:
    for T in T_ALL:
        plan = dispatch(make_slots("all -1", T), torch.ones(T, 2, device=DEVICE))
        assert plan.groups == () and plan.slots == ()


def test_it_is_repeatable() -> None:
    first, second = make("zipf", 133)[2], make("zipf", 133)[2]
    for a, b in zip(first.groups, second.groups, strict=True):
        assert torch.equal(tokens_of(a.tokens, 133), tokens_of(b.tokens, 133))


def test_weights_keep_their_gradient() -> None:
    slots = make_slots("uniform", 63)
    weights = torch.rand(63, 2, requires_grad=True, device=DEVICE)
    total = sum(group.weights.sum() for group in dispatch(slots, weights).groups if group.weights is not None)
    total.backward()
    assert torch.equal(weights.grad, (slots >= 0).float())
