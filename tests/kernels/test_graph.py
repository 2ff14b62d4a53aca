"""What only a GPU can show: no step waits for the host, and a captured one stays right when adapters are swapped."""

import pytest
import torch

from molora_kernels import Factors
from molora_kernels.paged import add_lora_paged
from tests.conftest import DEVICE
from tests.kernels.test_paged import FORMS, RANKS, Case
from tests.kernels.test_route import Case as RouteCase
from tests.kernels.test_route import StepState, route_prompt, route_step

pytestmark = pytest.mark.gpu


def call(case: Case, form: str) -> torch.Tensor:
    return add_lora_paged(case.y, case.x, case.pages, case.slots, case.weights, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_no_step_waits_for_the_device(form: str) -> None:
    case, routing = Case("zipf", 70), RouteCase((0.8, 0.95), 2, "softmax")
    router, flat, choice = routing.kernel()
    state = StepState.new(4, router, choice.forced.shape[1])
    ids, real = torch.arange(4, device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    prompts = ids.view(4, 1).expand(4, 70), real.view(4, 1).expand(4, 70)
    for strict in (False, True):  # the first time compiles
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            call(case, form)
            route_step(ids, real, router, flat, choice, state, True)
            route_prompt(*prompts, router, flat, choice, state.memory, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(case.y).all()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_captured_call_is_eager_after_fifty_swaps(form: str) -> None:
    case = Case("zipf", 70, ranks=RANKS["16"], dtype=torch.bfloat16)
    clean = case.y.clone()
    call(case, form)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(case, form)
    generator = torch.Generator().manual_seed(0)
    for swap in range(50):
        rank = 1 + swap % 64
        new = [
            Factors(*(torch.randn(rank, size, generator=generator).to(DEVICE, case.dtype) / 10 for size in (100, wide)))
            for wide in case.outputs
        ]
        case.pages.put(swap % 6, new)
        case.slots.copy_(case.slots[torch.randperm(70, generator=generator).to(DEVICE)])
        case.y.copy_(clean)
        graph.replay()
        replayed = case.y.clone()
        case.y.copy_(clean)
        assert torch.equal(call(case, form), replayed)
