"""Few tokens, each with its own adapters, through joined factors: as one adapter after the other."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from molora.adapter import LoRAWeights
from molora.layer import MoLoRALinear
from molora.plan import RoutingPlan

SLOTS = {"own": [[0, -1], [3, 5], [-1, -1], [5, 0]], "some": [[3, -1], [-1, -1], [3, 0], [-1, 3]]}


def make(ranks: dict[int, int]) -> tuple[MoLoRALinear, SimpleNamespace]:
    torch.manual_seed(0)
    source = SimpleNamespace(kept=slice(None), plan=lambda layer: None)
    module = MoLoRALinear.from_base(nn.Linear(6, 5), source)
    for slot, rank in ranks.items():
        module.set_factors(slot, LoRAWeights(torch.randn(rank, 6), torch.randn(5, rank), 0.5 + slot), torch.float32)
    return module, source


def plan_of(slots: list[list[int]], weights: torch.Tensor | None) -> RoutingPlan:
    found = torch.tensor(slots).unsqueeze(1)
    return RoutingPlan(found, torch.ones(found.shape) if weights is None else weights, unit=weights is None)


@pytest.mark.parametrize("unit", [True, False])
@torch.no_grad()
def test_each_token_gets_its_own(unit: bool) -> None:
    module, source = make({0: 2, 3: 1, 5: 4, 7: 3})
    exact = {slot: (one.A.double(), one.B.double()) for slot, one in module.factors.items()}
    x = torch.randn(4, 1, 6)
    for _ in range(2):
        for slots in SLOTS.values():  # what is joined for one plan serves the next
            weights = None if unit else torch.rand(4, 1, 2) + 0.1
            plan = plan_of(slots, weights)
            source.plan = lambda layer, plan=plan: plan
            expected = module.base_layer(x).double()
            for token, own in enumerate(slots):
                for column, slot in enumerate(own):
                    if slot >= 0:
                        A, B = exact[slot]
                        share = 1.0 if weights is None else float(weights[token, 0, column])
                        expected[token] += share * (x[token].double() @ A.T @ B)
            assert (module(x) - expected).abs().max() < 1e-5
    module.set_factors(3, LoRAWeights(torch.zeros(1, 6), torch.zeros(5, 1), 1.0), torch.float32)
    plan = plan_of([[3, -1], [-1, -1], [3, -1], [-1, -1]], None)
    source.plan = lambda layer: plan
    assert torch.equal(module(x), module.base_layer(x))  # not what was joined before


@torch.no_grad()
def test_what_is_no_number_stays_where_it_is() -> None:
    module, source = make({0: 2, 1: 2})
    module.set_factors(1, LoRAWeights(torch.full((2, 6), 3e38), torch.randn(5, 2), 1.0), torch.float32)
    x = torch.ones(3, 1, 6)
    plan = plan_of([[0], [1], [-1]], None)
    source.plan = lambda layer: plan
    found = module(x)
    assert not found[1].isfinite().all() and found[0].isfinite().all()
    assert torch.equal(found[2], module.base_layer(x)[2])
