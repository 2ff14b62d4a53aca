"""Single tokens by kernels and in plain torch: the same plans, and the same memory after them."""

from pathlib import Path

import pytest
import torch

from molora.vllm.folder import read_manifest
from molora.vllm.memory import SlotMemory
from molora.vllm.routed import RoutedStack, Step
from molora.vllm.selections import Selections
from tests.conftest import DEVICE
from tests.vllm.conftest import prompt_of


@pytest.mark.parametrize("kind", ["averages", "gated", "twice"])
@pytest.mark.parametrize("choice", [None, '{"personality": "law"}', '{"domain": ["code"], "user": "ada"}'])
def test_kernels_route_as_torch_does(kind: str, choice: str | None, folders: dict[str, Path]) -> None:
    stacks = [RoutedStack(folders[kind], DEVICE) for _ in range(2)]
    stacks[0]._tokens = None  # on a GPU it has them, too
    stacks[1].by_kernels(Selections(read_manifest(folders[kind])).layers)
    memories = [SlotMemory(90, DEVICE) for _ in stacks]
    ids = torch.tensor([prompt_of(24, seed) for seed in range(3)], device=DEVICE)
    kv = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:72].view(3, 24).to(DEVICE)
    found: list[torch.Tensor] = []
    for stack, memory in zip(stacks, memories, strict=True):
        plans = []
        memory.widen(stack.size)
        for first, last in [(0, 5), *((token, token + 1) for token in range(5, 24))]:
            before = kv[:, first - 1] if first else torch.full((3,), -1, device=DEVICE)
            with torch.no_grad():
                plans.append(stack.plan(Step(choice, before, kv[:, first:last]), ids[:, first:last], memory))
        # By adapter, as those of a weight of nearly 0 have no order; when all are made, as a step may need several.
        slots, weights = (
            torch.cat([plan.slots % 6 for plan in plans], 1),
            torch.cat([plan.weights for plan in plans], 1),
        )
        found.append(torch.zeros(3, 24, 6, device=DEVICE).scatter_add_(2, slots, weights)[..., :5])
    one, other = found
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (one > 0).any(1).any(0).sum() > 1  # several adapters act
    torch.testing.assert_close(memories[0].table, memories[1].table, rtol=1e-4, atol=1e-5)
