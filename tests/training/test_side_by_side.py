"""Adapters that learn side by side: what each becomes alone, and what PEFT's becomes of the same steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from molora.errors import ConfigError, NonFiniteError
from molora.factors import Factors, concatenated
from molora.personalize.generated import generated, stacked
from molora_training.batches import plan_steps
from molora_training.data import Encoded, collate, encode
from molora_training.schedule import warm_cosine
from molora_training.side_by_side import Schedule, module_names, train_adapters
from tests.unit.spoken import make_spoken

NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
PAIRS = [("Colour?", "blue"), ("Number?", "seven"), ("An animal that flies at night?", "an owl"), ("Why?", "so")]
HOW = Schedule(learning_rate=3e-2, epochs=20, batch_tokens=128)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = make_spoken(tmp_path, domains=())
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    return model


def rows(model: Any, pairs: Any = PAIRS[:2]) -> list[Encoded]:
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], model.tokenizer, ["x"], ["x"])
        for q, a in [*pairs] * 4
    ]


def below(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(3, 48, generator=generator) / 7, torch.randn(32, 3, generator=generator) / 3)
        for name in NAMES
    }


@torch.no_grad()
def loss(model: Any, factors: Factors) -> float:
    total = 0.0
    with generated(model.base, stacked([factors])):
        for row in rows(model):
            logits = model.base(row.input_ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row.labels[1:]))
    return total / len(rows(model))


def test_one_learns_on_top_of_what_stays(model: Any) -> None:
    fixed = below()
    before = {name: (A.clone(), B.clone()) for name, (A, B) in fixed.items()}
    (found,) = train_adapters(model.base, [rows(model)], 0, HOW, NAMES, rank=2, below=[fixed])
    assert {(tuple(A.shape), tuple(B.shape)) for A, B in found.values()} == {((2, 48), (32, 2))}
    assert all(torch.equal(A, fixed[name][0]) and torch.equal(B, fixed[name][1]) for name, (A, B) in before.items())
    both = concatenated([fixed, found])
    assert loss(model, both) < 0.5 * loss(model, fixed)
    assert loss(model, both) < loss(model, found)  # it was made for what is below it
    (again,) = train_adapters(model.base, [rows(model)], 0, HOW, NAMES, rank=2, below=[fixed])
    assert all(torch.equal(found[name][1], again[name][1]) for name in found)


@pytest.mark.parametrize(
    "beneath", [[], [below()], [below(1), below(2), below(3)]], ids=["none", "one", "each its own"]
)
def test_nobody_learns_from_another(model: Any, beneath: list[Factors]) -> None:
    """Whose steps are over leaves the others alone, too."""
    model.base.double()
    users = [rows(model, PAIRS[:1]), rows(model, PAIRS), rows(model, PAIRS[2:])]
    together = train_adapters(model.base, users, 0, HOW, NAMES, 2, 4.0, beneath)
    for number, (own, found) in enumerate(zip(users, together, strict=True)):
        fixed = beneath[number : number + 1] if len(beneath) > 1 else beneath
        (alone,) = train_adapters(model.base, [own], 0, HOW, NAMES, 2, 4.0, fixed)
        for name in NAMES:
            torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-6)
            assert alone[name][1].any()


def test_its_steps_are_pefts(model: Any) -> None:
    model.base.double()
    own, alpha = rows(model, PAIRS), 6.0
    other, found = train_adapters(model.base, [rows(model, PAIRS[:1]), own], 0, HOW, NAMES, 2, alpha)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(model.base, config)
    parameters = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    chance = torch.Generator().manual_seed(HOW.seed)
    with torch.no_grad():
        for name in NAMES:
            A = parameters[f"base_model.model.{name}.lora_A.default.weight"]
            A.copy_((torch.rand(2, 48, generator=chance) * 2 - 1) * 48**-0.5)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    steps = plan_steps([row.input_ids.numel() for row in own], HOW.batch_tokens, HOW.epochs, HOW.seed)
    for number, indices in enumerate(steps):
        batch = collate([own[index] for index in indices], 0)
        logits = peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.param_groups[0]["lr"] = warm_cosine(number, len(steps), 0.1, HOW.learning_rate)
        optimizer.step()
    for name in NAMES:
        A, B = (parameters[f"base_model.model.{name}.lora_{part}.default.weight"].float() for part in "AB")
        torch.testing.assert_close(found[name][1] @ found[name][0], alpha / 2 * B @ A, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(other[name][1] @ other[name][0], found[name][1] @ found[name][0], atol=1e-2)


def test_what_does_not_fit(model: Any) -> None:
    assert module_names(model.base, ["down_proj"]) == NAMES
    with pytest.raises(ConfigError, match="no linear module that ends with swim_proj"):
        module_names(model.base, ["swim_proj"])
    fixed = below()
    fixed[NAMES[1]][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="at step 1"):
        train_adapters(model.base, [rows(model)], 0, Schedule(), NAMES, below=[fixed])
