"""The routing step in one kernel against the router's own modules and plan, token after token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora import RouterConfig, Stack, StackLayer
from molora.plan import layer_tables, route
from molora.router import RouterPart
from molora.selection import candidates, resolve, router_rows
from molora.stack import SlotTable
from molora_kernels.route import Candidates, Choice, RouterWeights, StepState, choose, route_step
from tests.conftest import DEVICE

VOCABULARY, HIDDEN = 40, 24
SELECTIONS: list[dict[str, Any]] = [
    {"personality": None, "domain": "auto", "user": "auto"},
    {"personality": "sage", "domain": ["law", "code"], "user": None},
    {"personality": "auto", "domain": "math", "user": "ada"},
    {"personality": ["sage"], "domain": ["math"], "user": None},
]


class Case:
    """A router with random weights over three layers, four sequences with different selections."""

    def __init__(self, decays: tuple[float, ...], top_k: int, weights: str) -> None:
        torch.manual_seed(0)
        self.stack = Stack(
            [
                StackLayer("personality", {"pirate": Path("p"), "sage": Path("s")}),
                StackLayer("domain", {name: Path(name) for name in ("math", "code", "law", "art")}, top_k=top_k),
                StackLayer("user", {"ada": Path("a")}),
            ]
        )
        table = SlotTable()
        for label in self.stack.names:
            table.take(label)
        self.weights, self.rows = weights, router_rows(self.stack)
        self.layers = candidates(self.stack, table)
        self.part = RouterPart(RouterConfig(width=12, hidden=40, decays=decays), 0, len(self.rows), HIDDEN).to(DEVICE)
        torch.nn.init.normal_(self.part.output.weight, std=1.0)
        torch.nn.init.normal_(self.part.output.bias, std=0.5)
        self.part.eval().requires_grad_(False)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN).to(DEVICE)
        self.selection = resolve(SELECTIONS, self.stack, table, True).to(DEVICE)

    def kernel(self) -> tuple[RouterWeights, Candidates, Choice]:
        self.part.fold(self.embedding, DEVICE)
        part = self.part
        assert part.table is not None
        flat_rows = [self.rows.index(row) for layer in self.layers for row in layer.rows]
        flat_slots = [slot for layer in self.layers for slot in layer.slots]
        firsts = [*(layer.first for layer in self.layers), len(flat_rows)]
        columns = [*(layer.column for layer in self.layers), self.selection.forced.shape[1]]

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        return (
            RouterWeights(
                part.table, part.decays, part.input.weight, part.input.bias, part.output.weight, part.output.bias
            ),
            Candidates(ints(flat_rows), ints(flat_slots), ints(firsts), ints(columns)),
            Choice(self.selection.allowed, self.selection.forced.int(), self.selection.routed),
        )


@pytest.mark.parametrize(("top_k", "weights"), [(1, "unit"), (2, "unit"), (2, "softmax"), (3, "softmax")])
@pytest.mark.parametrize("decays", [(0.8, 0.95), (), (0.5,)])
@pytest.mark.parametrize("copies", [1, 5])
@torch.no_grad()
def test_every_step_is_the_routers(copies: int, decays: tuple[float, ...], top_k: int, weights: str) -> None:
    """With five copies of each sequence there are enough for the MLP to take them in blocks."""
    case = Case(decays, top_k, weights)
    steps = 12 if copies == 1 else 3
    ids = torch.randint(VOCABULARY, (4, steps), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    real = torch.ones(4, steps, dtype=torch.bool, device=DEVICE)
    real[1, :5] = real[3, :2] = False  # left padding
    z = case.part.read_ids(ids, case.embedding)
    logits = case.part(case.part.features(z, real, None))
    tables = layer_tables(case.rows, case.layers, DEVICE)
    plan = route(logits, tables, case.selection, weights, False)
    assert len(plan.slots.unique()) >= 4
    router, flat, choice = case.kernel()
    choice = Choice(*(mask.repeat(copies, 1) for mask in (choice.allowed, choice.forced, choice.routed)))
    state = StepState.new(4 * copies, router, plan.slots.shape[-1])
    for t in range(steps):
        column = [each[:, t].repeat(copies) for each in (ids, real)]
        route_step(*column, router, flat, choice, state, weights == "softmax")
        assert (state.logits - logits[:, t].repeat(copies, 1)).abs().max() <= 1e-5 * logits.abs().max()
        slots, wanted = (of[:, t].repeat(copies, 1) for of in (plan.slots, plan.weights))
        assert torch.equal(state.slots, slots.int())
        assert torch.allclose(state.weights[slots >= 0], wanted[slots >= 0], atol=1e-5)


@pytest.mark.parametrize(("top_k", "weights"), [(1, "unit"), (3, "softmax")])
@torch.no_grad()
def test_a_prompt_is_chosen_for_in_one_launch(top_k: int, weights: str) -> None:
    case = Case((0.8, 0.95), top_k, weights)
    logits = torch.randn(4, 9, len(case.rows), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plan = route(logits, layer_tables(case.rows, case.layers, DEVICE), case.selection, weights, False)
    _, flat, choice = case.kernel()
    slots, found = choose(logits, flat, choice, weights == "softmax")
    assert torch.equal(slots, plan.slots.int())
    acting = plan.slots >= 0
    assert torch.allclose(found[acting], plan.weights[acting], atol=1e-5)


def test_another_number_of_sequences_is_refused() -> None:
    case = Case((0.8,), 1, "unit")
    router, flat, choice = case.kernel()
    state = StepState.new(4, router, 3)
    ids, real = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="3 token ids"):
        route_step(ids, real, router, flat, choice, state, False)
    assert not state.memory.any()
