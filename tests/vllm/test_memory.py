"""The memory by KV slot: a sequence that goes on from a slot is where it would be had it been read in one piece."""

from typing import Any

import pytest
import torch

from molora import Router
from molora.vllm.memory import Continued, SlotMemory
from tests.vllm.conftest import ROUTERS


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_goes_on_from_any_token(kind: str) -> None:
    torch.manual_seed(0)
    part: Any = Router(ROUTERS[kind], ["domain/a", "domain/none"], 16).eval().parts[0]
    rule = part.new_memory(1, None).rule
    z = torch.randn(2, 11, part.width)
    real = torch.ones(2, 11, dtype=torch.bool)
    size = rule.empty(1).numel()
    memory = SlotMemory(40, z.device)
    memory.widen(size + 8)
    columns = slice(5, 5 + size)  # beside those of another part
    slots = torch.randperm(40)[:22].view(2, 11)
    with torch.no_grad():
        whole = part.new_memory(2, None).append(z, real)
        before = torch.full((2,), -1)
        for piece in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 11)):
            past = Continued(rule, memory.read(before, columns))
            torch.testing.assert_close(past.append(z[:, piece], real[:, piece]), whole[:, piece])
            memory.write(slots[:, piece], columns, past.states)
            before = slots[:, piece.stop - 1]
        for token in range(11):  # what lies at a slot is the state after its token
            shorter = part.new_memory(2, None)
            shorter.append(z[:, : token + 1], real[:, : token + 1])
            torch.testing.assert_close(memory.read(slots[:, token], columns), shorter.state.flatten(1))
    assert memory.table.count_nonzero() == memory.table[:, columns].count_nonzero() > 0


def test_wider_memory_keeps_what_it_has() -> None:
    memory = SlotMemory(4, torch.device("cpu"))
    memory.widen(2)
    memory.write(torch.tensor([[1]]), slice(0, 2), torch.tensor([[[3.0, 4.0]]]))
    memory.widen(5)
    memory.widen(3)
    assert memory.read(torch.tensor([1, -1]), slice(0, 5)).tolist() == [[3, 4, 0, 0, 0], [0, 0, 0, 0, 0]]
