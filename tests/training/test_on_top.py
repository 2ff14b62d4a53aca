"""A small adapter that is trained on top of generated factors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import NonFiniteError
from molora.personalize.factors import concatenated
from molora_training.data import encode
from molora_training.generated import generated
from molora_training.on_top import train_on_top
from tests.unit.spoken import make_spoken

NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = make_spoken(tmp_path, domains=())
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    return model


def rows(model: Any) -> list[Any]:
    pairs = [("Colour?", "blue"), ("Number?", "seven")] * 4
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], model.tokenizer, ["x"], ["x"])
        for q, a in pairs
    ]


def below() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(3, 48, generator=generator) / 7, torch.randn(32, 3, generator=generator) / 3)
        for name in NAMES
    }


@torch.no_grad()
def loss(model: Any, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = 0.0
    with generated(model.base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
        for row in rows(model):
            logits = model.base(row.input_ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row.labels[1:]))
    return total / len(rows(model))


def test_it_learns_beside_what_stays(model: Any) -> None:
    fixed = below()
    before = {name: (A.clone(), B.clone()) for name, (A, B) in fixed.items()}
    found = train_on_top(model.base, fixed, rows(model), 0, rank=2, learning_rate=3e-2, epochs=20, batch_tokens=128)
    assert {(tuple(A.shape), tuple(B.shape)) for A, B in found.values()} == {((2, 48), (32, 2))}
    assert all(torch.equal(A, fixed[name][0]) and torch.equal(B, fixed[name][1]) for name, (A, B) in before.items())
    both = concatenated([fixed, found])
    assert loss(model, both) < 0.5 * loss(model, fixed)
    assert loss(model, both) < loss(model, found)  # it was made for what is below it
    again = train_on_top(model.base, fixed, rows(model), 0, rank=2, learning_rate=3e-2, epochs=20, batch_tokens=128)
    assert all(torch.equal(found[name][1], again[name][1]) for name in found)


def test_a_loss_that_is_not_finite(model: Any) -> None:
    fixed = below()
    fixed[NAMES[1]][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="at step 1"):
        train_on_top(model.base, fixed, rows(model), 0)
