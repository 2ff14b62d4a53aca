"""A training step without masks, filled up and captured, is the step of `transformers`' own attention, uncaptured."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel
from molora_training.attention import attend_causally
from molora_training.captured import OFTEN, CapturedSteps, filled, filled_shape, worth_capturing
from molora_training.data import IGNORED, Batch
from molora_training.router_objective import Labels, RouterObjective
from molora_training.router_settings import LossWeights
from tests.conftest import DEVICE, make_base
from tests.parity.test_equalities import close, make_routed

DOMAINS = ["math", "code", "general"]
WEIGHTS = LossWeights(lm=1.0, label=0.5, balance=0.1, z=0.01)


def make_batch(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Random conversations of ``lengths`` tokens, half of them answers."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    real = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 97, size, generator=generator) * real
    answered = real & (torch.rand(size, generator=generator) < 0.5)
    domains = torch.randint(0, len(DOMAINS), size, generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=real.long(),
        labels=ids.masked_fill(~answered, IGNORED),
        segments=torch.where(real, 0, -1),
        domain_ids=domains.masked_fill(~real, -1),
    ).to(DEVICE)


def make_objective(base: Any, adapters: dict[str, Path], weights: LossWeights = WEIGHTS, **config: Any) -> Any:
    model = make_routed(base, adapters, **config).requires_grad_(False)
    model.router.requires_grad_(True)
    labels = Labels(model, DOMAINS)
    rows = {layer: torch.linspace(0.5, 1, len(rows)) for layer, rows in labels.rows.items()}
    return RouterObjective(model.train(), labels, weights, rows)


def gradients(objective: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def stepped(objective: Any, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    objective.zero_grad(set_to_none=True)
    terms = objective(batch)
    terms["loss"].backward()
    return {name: value.detach().clone() for name, value in terms.items()}, gradients(objective).clone()


def same(found: tuple[dict[str, torch.Tensor], torch.Tensor], expected: tuple[Any, torch.Tensor]) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
    assert expected[1].abs().max() > 0
    close(found[1], expected[1], 2e-5)


@pytest.mark.parametrize("reads", [0, 1, (0, 2)], ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS, LossWeights()], ids=["tokens", "labels"])
def test_neither_a_mask_nor_padding_changes_a_step(
    weights: LossWeights, reads: Any, base: Any, adapters: dict[str, Path]
) -> None:
    batch = make_batch((17, 9, 30))
    objective = make_objective(base, adapters, weights, reads=reads)
    expected = stepped(objective, batch)
    more = filled(batch, 130)
    assert more.input_ids.shape == (4, 32)
    same(stepped(objective, more), expected)
    assert attend_causally(objective.model.base, 64)
    same(stepped(objective, more), expected)


def test_the_losses_are_those_of_the_real_tokens_alone(base: Any, adapters: dict[str, Path]) -> None:
    objective, batch = make_objective(base, adapters), make_batch((17, 9, 30))
    terms, _ = stepped(objective, batch)
    model: MoLoRAModel = objective.model
    selection = objective.labels.selection(model)
    with torch.no_grad():
        out = model(batch.input_ids, batch.attention_mask, selection=selection, output_routes=True, labels=batch.labels)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(terms["lm"], out.loss)  # of transformers
    labels = expected_labels(objective, out.routes.logits[0][real], batch.domain_ids[real])
    torch.testing.assert_close(terms["label"], labels)


def expected_labels(objective: Any, logits: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
    """The label term of the real tokens [N, rows], added up here in a loop over the layers' own rows."""
    total = logits.new_zeros(())
    for layer, rows in objective.labels.rows.items():
        target = objective.labels.targets[layer].to(DEVICE)[domains]
        weight = objective.class_weights[layer][target]
        own = logits[:, rows].log_softmax(-1).gather(1, target[:, None])[:, 0]
        total = total - (weight * own).sum() / weight.sum()
    return total


def test_a_base_that_needs_masks_keeps_them() -> None:
    base = make_base("gemma3")
    before = base.config._attn_implementation
    assert not attend_causally(base, 64)  # layers of which attend to the last 16 tokens
    assert base.config._attn_implementation == before
    eager = copy.deepcopy(make_base("llama"))
    eager.set_attn_implementation("eager")
    assert not attend_causally(eager, 64)


def test_what_comes_often_is_worth_a_capture() -> None:
    often, seldom = [[17, 9, 30]] * (OFTEN - 1) + [[32]], [[100, 70]] * (OFTEN - 1)
    assert worth_capturing([*often, *seldom], 256) == {(8, 32)}
    for lengths in (often[0], often[-1], seldom[0], [200, 5], [3] * 40):
        batch = make_batch(tuple(lengths))
        assert filled(batch, 256).input_ids.shape == filled_shape(*batch.input_ids.shape, 256)


@pytest.mark.gpu
def test_other_shapes_run_as_they_are(base: Any, adapters: dict[str, Path]) -> None:
    objective = make_objective(base, adapters)
    assert attend_causally(objective.model.base, 128)
    steps = CapturedSteps(objective, objective.parameters(), 256, worth={(8, 32)})
    for shape in [(17, 9, 30), (100, 70)] * 3:
        batch = make_batch(shape)
        expected = stepped(objective, batch)
        objective.zero_grad(set_to_none=True)
        same((steps(batch), gradients(objective)), expected)
    assert list(steps._steps) == [torch.Size((8, 32))] and steps._steps[torch.Size((8, 32))] is not None


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [1024, 0], ids=["hot", "by slot"])
@pytest.mark.parametrize("reads", [0, (0, 2)], ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS, LossWeights()], ids=["tokens", "labels"])
def test_captured_steps_are_eager_ones(
    weights: LossWeights, reads: Any, hot: int, base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora_kernels.forms.HOT_TRAINED", hot)
    objective = make_objective(base, adapters, weights, reads=reads)
    assert attend_causally(objective.model.base, 128)
    steps = CapturedSteps(objective, objective.parameters(), 256)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.01)
    shapes = [(17, 9, 30), (100, 70), (40, 50, 60, 64, 20)]
    for number in range(12):  # each shape comes four times: eager, captured and replayed, replayed twice
        batch = make_batch(shapes[number % 3], seed=number)
        # Of the same shape: with two routers a padding's rounding comes back a hundred times as large in the gradients.
        expected = stepped(objective, filled(batch, 256))
        objective.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        taken = [torch.full((128,), 10**9, dtype=torch.int32, device=DEVICE) for _ in range(4096)]  # what was freed
        found = steps(batch)
        del taken
        same((found, gradients(objective)), expected)
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    assert steps.able and all(step is not None for step in steps._steps.values()) and len(steps._steps) == 3


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(base: Any, adapters: dict[str, Path]) -> None:
    objective = make_objective(base, adapters)
    assert attend_causally(objective.model.base, 64)
    batch = make_batch((17, 9, 30))
    stepped(objective, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.zero_grad(set_to_none=True)
        objective(batch)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is(
    base: Any, adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Waits(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            terms: dict[str, torch.Tensor] = self.inner(batch)
            assert float(terms["loss"]) > 0
            return terms

    objective = Waits(make_objective(base, adapters))
    attend_causally(objective.inner.model.base, 64)
    steps, batch = CapturedSteps(objective, objective.parameters(), 256), make_batch((17, 9, 30))
    expected = stepped(objective, batch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            same((steps(batch), gradients(objective)), expected)
    assert torch.rand(3, device=DEVICE).isfinite().all()  # a capture that fails leaves the generator unusable
    assert torch.cuda.get_sync_debug_mode() == 0
    assert not steps.able and len([r for r in caplog.records if "not captured" in r.message]) == 1


def test_what_a_captured_step_reads_lasts_as_long_as_its_objective(base: Any, adapters: dict[str, Path]) -> None:
    """A graph reads the selection where it lay when it was captured, whatever batches came since."""
    objective = make_objective(base, adapters, LossWeights(), reads=(0, 2))
    routing = objective.model.routing
    objective(make_batch((17, 9, 30)))
    first = routing._current
    objective(make_batch((17, 9)))
    assert routing._current is not first
    objective(make_batch((30, 20, 10)))
    assert routing._current is first is objective.selection(3)
