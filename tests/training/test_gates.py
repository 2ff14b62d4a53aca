"""Gates of a frozen adapter: what they do, and that they learn for which inputs it was made."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.adapter import Adapter
from molora.errors import NonFiniteError
from molora.factors import of_adapter
from molora.personalize.generated import stacked
from molora_training.data import Encoded, encode
from molora_training.gates import gated, train_gates
from molora_training.side_by_side import Schedule
from tests.conftest import write_adapter
from tests.unit.spoken import make_spoken


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return make_spoken(tmp_path / "m", domains=())


def rows(model: Any) -> list[Encoded]:
    pairs = [("Colour?", "blue"), ("Number?", "seven"), ("Animal?", "an owl")] * 4
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], model.tokenizer, ["x"], ["x"])
        for q, a in pairs
    ]


@torch.no_grad()
def test_a_gate_of_zero_lets_half_through(model: Any, tmp_path: Path) -> None:
    adapter = Adapter.load(write_adapter(model.base, tmp_path / "ada", 1, target_modules=["q_proj", "v_proj"]))
    half = {name: torch.zeros(weights.A.shape[1]) for name, weights in adapter.modules.items()}
    x = torch.randn(1, 5, 32)
    name = "model.layers.1.self_attn.q_proj"
    module, weights = model.base.get_submodule(name), adapter.modules[name]
    plain, delta = module(x), weights.scale * (x @ weights.A.T @ weights.B.T)
    factors = stacked([of_adapter(adapter)])
    with gated(model.base, factors, {name: gate[None] for name, gate in half.items()}):
        torch.testing.assert_close(module(x), plain + 0.5 * delta)
    wide = {key: torch.full((1, len(gate)), 3.0) for key, gate in half.items()}
    with gated(model.base, factors, wide):
        share = torch.sigmoid(3.0 * x.sum(-1, keepdim=True))
        torch.testing.assert_close(module(x), plain + share * delta)
    assert torch.equal(module(x), plain)


def test_gates_learn_and_the_adapter_stays(model: Any, tmp_path: Path) -> None:
    adapter = Adapter.load(write_adapter(model.base, tmp_path / "ada", 1, target_modules=["q_proj", "v_proj"]))
    before = copy.deepcopy({name: weights.A for name, weights in adapter.modules.items()})
    some = rows(model)
    how = Schedule(learning_rate=1e-2, epochs=2, batch_tokens=128)
    (found,) = train_gates(model.base, [of_adapter(adapter)], [some], 0, how)
    assert set(found) == set(adapter.modules) and all(gate.any() for gate in found.values())
    (again,) = train_gates(model.base, [of_adapter(adapter)], [some], 0, how)
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = of_adapter(
        Adapter.load(write_adapter(model.base, tmp_path / "bob", 2, target_modules=["q_proj", "v_proj"]))
    )
    both = train_gates(model.base, [other, of_adapter(adapter)], [some[1:], some], 0, how)
    for name, gate in found.items():  # beside another's
        torch.testing.assert_close(both[1][name], gate, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(weights.A, before[name]) for name, weights in adapter.modules.items())
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


def test_what_is_beneath_acts_while_gates_learn(model: Any, tmp_path: Path) -> None:
    """As if it were in the base's own weights."""
    adapter = of_adapter(Adapter.load(write_adapter(model.base, tmp_path / "ada", 1, target_modules=["q_proj"])))
    task = of_adapter(Adapter.load(write_adapter(model.base, tmp_path / "task", 2, target_modules=["v_proj"])))
    how = Schedule(learning_rate=1e-2, epochs=2, batch_tokens=128)
    (alone,) = train_gates(model.base, [adapter], [rows(model)], 0, how)
    (found,) = train_gates(model.base, [adapter], [rows(model)], 0, how, task)
    merged = copy.deepcopy(model.base)
    with torch.no_grad():
        for name, (A, B) in task.items():
            merged.get_submodule(name).weight += B @ A
    (wanted,) = train_gates(merged, [adapter], [rows(model)], 0, how)
    for name, gate in found.items():
        torch.testing.assert_close(gate, wanted[name], rtol=1e-2, atol=1e-3)
    assert any(not torch.allclose(gate, alone[name], rtol=1e-2, atol=1e-3) for name, gate in found.items())


def test_gates_close_for_an_adapter_that_does_harm(model: Any, tmp_path: Path) -> None:
    """By the sign of x . g: on the inputs of its own text little of it acts in the end."""
    adapter = Adapter.load(write_adapter(model.base, tmp_path / "ada", 1, target_modules=["down_proj"], lora_alpha=64))
    some = rows(model)

    def loss(gates: dict[str, torch.Tensor], adapter: Adapter = adapter) -> float:
        own = {name: gate[None] for name, gate in gates.items()}
        with torch.no_grad(), gated(model.base, stacked([of_adapter(adapter)]), own):
            total = 0.0
            for row in some:
                logits = model.base(row.input_ids[None]).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, row.labels[1:]))
        return total

    start = {name: torch.zeros(weights.A.shape[1]) for name, weights in adapter.modules.items()}
    how = Schedule(learning_rate=1.0, epochs=20, batch_tokens=256)
    (found,) = train_gates(model.base, [of_adapter(adapter)], [some], 0, how)
    unchanged = Adapter(adapter.path, {}, adapter.config)
    plain = loss({}, unchanged)
    assert loss(start) - plain > 0.5 and loss(found) - plain < 0.1


def test_a_loss_that_is_not_finite(model: Any, tmp_path: Path) -> None:
    adapter = Adapter.load(write_adapter(model.base, tmp_path / "ada", 1, target_modules=["q_proj"]))
    adapter.modules["model.layers.0.self_attn.q_proj"].A.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="at step 1"):
        train_gates(model.base, [of_adapter(adapter)], [rows(model)], 0, Schedule())
