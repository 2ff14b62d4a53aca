"""The routing kernels, a token or a prompt at a time, against the router's own modules and plan."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.memory import Memory
from molora.plan import RoutingPlan, kernel_candidates, layer_tables, route
from molora.router import RouterPart
from molora.selection import candidates, resolve, router_rows
from molora.stack import SlotTable
from molora_kernels.affine import affine
from molora_kernels.route import (
    Candidates,
    Choice,
    RouterWeights,
    StepState,
    choose,
    route_prompt,
    route_step,
)
from tests.conftest import DEVICE
from tests.parity.test_equalities import ROUTED, make_routed

VOCABULARY, HIDDEN = 40, 24
SELECTIONS: list[dict[str, Any]] = [
    {"personality": None, "domain": "auto", "user": "auto"},
    {"personality": "sage", "domain": ["law", "code"], "user": None},
    {"personality": "auto", "domain": {"math": 0.7, "law": -0.5, "art": 1.0, "code": 2.0}, "user": "ada"},
    {"personality": ["sage"], "domain": ["math"], "user": None},
]


class Case:
    """A router with random weights over three layers, four sequences with different selections."""

    def __init__(self, memory: dict[str, Any], top_k: int, weights: str) -> None:
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
        self.part = RouterPart(RouterConfig(width=12, hidden=40, **memory), 0, len(self.rows), HIDDEN).to(DEVICE)
        torch.nn.init.normal_(self.part.output.weight, std=1.0)
        torch.nn.init.normal_(self.part.output.bias, std=0.5)
        self.part.eval().requires_grad_(False)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN).to(DEVICE)
        self.selection = resolve(SELECTIONS, self.stack, self.layers, True).to(DEVICE)

    def kernel(self) -> tuple[RouterWeights, Candidates, Choice]:
        self.part.fold(self.embedding, DEVICE)
        assert self.part.table is not None
        columns = self.selection.forced.shape[1]
        found = kernel_candidates(self.rows, self.layers, columns, DEVICE)
        return self.part.for_kernels(self.part.table), found, self.selection.for_kernels


@pytest.mark.parametrize(("top_k", "weights"), [(1, "unit"), (2, "unit"), (2, "softmax"), (3, "softmax")])
@pytest.mark.parametrize(
    "memory", [{"decays": (0.8, 0.95)}, {"decays": ()}, {"units": 24}, {"units": 9, "depth": 1}], ids=str
)
@pytest.mark.parametrize("copies", [1, 5])
@torch.no_grad()
def test_every_step_is_the_routers(copies: int, memory: dict[str, Any], top_k: int, weights: str) -> None:
    """With five copies of each sequence there are enough for the MLP to take them in blocks."""
    case = Case(memory, top_k, weights)
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
    masks = (choice.allowed, choice.forced, choice.shares, choice.routed)
    choice = Choice(*(mask.repeat(copies, 1) for mask in masks))
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
    case = Case({"decays": (0.8, 0.95)}, top_k, weights)
    logits = torch.randn(4, 9, len(case.rows), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plan = route(logits, layer_tables(case.rows, case.layers, DEVICE), case.selection, weights, False)
    _, flat, choice = case.kernel()
    slots, found = choose(logits, flat, choice, weights == "softmax")
    assert torch.equal(slots, plan.slots.int())
    acting = plan.slots >= 0
    assert torch.allclose(found[acting], plan.weights[acting], atol=1e-5)


@pytest.mark.parametrize(("top_k", "weights"), [(1, "unit"), (2, "unit"), (3, "softmax")])
@pytest.mark.parametrize(
    "kind", [{"decays": (0.8, 0.95)}, {"decays": ()}, {"units": 24}, {"units": 9, "depth": 1}], ids=str
)
@pytest.mark.parametrize("by_id", [True, False])
@torch.no_grad()
def test_prompts_are_the_routers(by_id: bool, kind: dict[str, Any], top_k: int, weights: str) -> None:
    """Prompts one after the other, each going on with the memory of those before, with padding in the middle."""
    case = Case(kind, top_k, weights)
    pieces = [1, 3, 45]  # a token for each program, and blocks of them
    ids = torch.randint(VOCABULARY, (4, sum(pieces)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    real = torch.ones(4, sum(pieces), dtype=torch.bool, device=DEVICE)
    real[1, :2] = real[3, 7:20] = real[0, 44:] = False
    z = case.part.read_ids(ids, case.embedding)
    q = case.part.features(z, real, None)
    logits = case.part(q)
    plan = route(logits, layer_tables(case.rows, case.layers, DEVICE), case.selection, weights, False)
    whole = case.part.new_memory(4, None)
    whole.append(z, real)
    router, flat, choice = case.kernel()
    memory, first = None, 0
    for tokens in pieces:
        here = slice(first, first + tokens)
        given = ids[:, here] if by_id else None
        mine = router if by_id else case.part.for_kernels(z[:, here].flatten(0, 1))
        found = route_prompt(given, real[:, here], mine, flat, choice, memory, weights == "softmax")
        memory, first = found.memory, first + tokens
        assert torch.equal(found.z, z[:, here])
        for own, wanted in ((found.q, q[:, here]), (found.logits, logits[:, here])):
            assert own.shape == wanted.shape and (own - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert torch.equal(found.slots, plan.slots[:, here].int())
        acting = found.slots >= 0
        assert torch.allclose(found.weights[acting], plan.weights[:, here][acting], atol=1e-5)
    assert torch.allclose(memory, whole.state, atol=1e-5)


@pytest.mark.parametrize("shape", [(70, 20, 9), (130, 100, 300), (2100, 40, 17)], ids=str)
def test_many_tokens_through_one_product(shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator) for size in ((tokens, inputs), (outputs, inputs), (outputs,)))
    y = torch.full((tokens, outputs), torch.nan, device=DEVICE)
    affine(x.to(DEVICE), w.to(DEVICE), b.to(DEVICE), y, True, {"PDL": False})
    expected = torch.nn.functional.silu(x.double() @ w.double().T + b.double())
    assert (y.double().cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


class Routed:
    """A model whose routes are made by the kernels, or by torch."""

    def __init__(self, model: MoLoRAModel, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.kernels, self.monkeypatch, self.cache = model, kernels, monkeypatch, None

    @torch.no_grad()
    def read(self, ids: torch.Tensor, **options: Any) -> tuple[Any, RoutingPlan, list[Memory]]:
        """Goes on with ``ids``: the state of the routing, the last plan and the memories after them."""
        routing, plans = self.model.routing, []
        with self.monkeypatch.context() as here:
            for module in ("routing", "memory"):
                here.setattr(f"molora.{module}.backend_for", lambda _: "triton" if self.kernels else "torch")
            here.setattr(routing, "routes", lambda names: plans.extend(routing.plans))
            self.cache = self.model(
                ids, past_key_values=self.cache, use_cache=True, output_routes=True, **options
            ).past_key_values
        return routing, plans[-1], self.cache.routing_memories


SELECTED: dict[str, list[dict[str, Any]]] = {
    "auto": [{"personality": None, "domain": "auto", "user": ["ada"]}],
    "some forced": [
        {"personality": "sage", "domain": "auto", "user": None},
        {"personality": None, "domain": "code", "user": "ada"},
        {"personality": None, "domain": ["math"], "user": None},
    ],
    "at weights": [
        {"personality": {"sage": 0.5}, "domain": "auto", "user": None},
        {"personality": None, "domain": {"math": 0.7, "code": -0.5}, "user": "ada"},
        {"personality": None, "domain": ["math"], "user": None},
    ],
    "all forced": [{"personality": "sage", "domain": "math", "user": None}],
}


@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("kind", ROUTED)
def test_a_models_prompts(
    kind: str, selected: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of a conversation, padded or not, a cache that is cropped and reordered: all as by torch."""
    model = make_routed(base, adapters, **ROUTED[kind])
    for part in model.router.parts:  # type: ignore[union-attr]
        part.output.weight.data *= 0.1  # the same choices, by logits that are not in the hundreds
        part.output.bias.data *= 0.1
    selection, (mine, theirs) = SELECTED[selected], (Routed(model, kernels, monkeypatch) for kernels in (True, False))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, 6:8] = 0
    turns: list[tuple[torch.Tensor, torch.Tensor | None]] = [(ids[:, :10], mask[:, :10]), (ids[:, 10:11], mask[:, :11])]
    turns += [(ids[:, 11:], mask), (ids[:, 9:15], None)]
    for turn, (piece, seen) in enumerate(turns):
        if turn == 3:
            for one in (mine, theirs):
                assert one.cache is not None
                one.cache.crop(-8)  # nine are left
                one.cache.batch_select_indices(torch.tensor([2, 0, 1], device=DEVICE))
        found = []
        for one in (mine, theirs):
            state, plan, memories = one.read(piece, attention_mask=seen, selection=selection * (3 // len(selection)))
            kept = [tensor for memory in memories for tensor in (memory.z, memory.real.float(), memory.state)]
            given = [tensor for tensor in (*state.features, *state.logits) if tensor is not None]
            found.append((plan, [plan.weights * (plan.slots >= 0), *given, *kept]))
        (own, numbers), (other, wanted) = found
        assert (own.chosen.dtype == torch.int32) == (selected != "all forced")  # the kernels' own
        assert own.slots.dtype == torch.int64 and torch.equal(own.slots, other.slots)
        assert len(numbers) == len(wanted)
        for a, b in zip(numbers, wanted, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_another_number_of_sequences_is_refused() -> None:
    case = Case({}, 1, "unit")
    router, flat, choice = case.kernel()
    state = StepState.new(4, router, 3)
    ids, real = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="3 token ids"):
        route_step(ids, real, router, flat, choice, state, False)
    assert not state.memory.any()
    with pytest.raises(ValueError, match="3 sequences"):
        route_prompt(ids.view(3, 1), real.view(3, 1), router, flat, choice, None, False)
