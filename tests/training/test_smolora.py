"""Blocks that are found by the question: what they give by hand, whom a gradient reaches, and what a task leaves alone.

The study's own test trains them on three tasks.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from molora.errors import ConfigError, DataError, NonFiniteError
from molora_training.continual import smolora
from molora_training.continual.separable import BLOCKS, SCALE, SETS, Choice, Gates, SeparableLinear, block_rank
from molora_training.continual.smolora import SMoLora
from molora_training.continual.update import UpdateSettings
from tests.unit.spoken import make_spoken

BLOCKS_OF = torch.tensor([[2, 1], [0, 3]])  # of two sequences, content and instruction


def rows_of(start: int, answer: str, count: int = 12) -> list[dict[str, list[dict[str, str]]]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": answer}]}
        for n in range(start, start + count)
    ]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], SMoLora]:
    model = make_spoken(tmp_path / "adapters")
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    how = UpdateSettings(
        tmp_path, "", "adapter", tmp_path, learning_rate=3e-2, max_length=64, batch_tokens=256, epochs=4, seed=3
    )
    return lambda: SMoLora(how, str(tmp_path / "base"), 16)


def filled(module: SeparableLinear) -> SeparableLinear:
    chance = torch.Generator().manual_seed(1)
    for parameter in (module.b, module.f):
        parameter.data.copy_(torch.randn(parameter.shape, generator=chance))
    return module


def test_two_sequences_by_hand() -> None:
    torch.manual_seed(0)
    choice = Choice()
    module = filled(SeparableLinear(nn.Linear(5, 7), 3, choice, torch.Generator().manual_seed(0))).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    with choice.of(BLOCKS_OF):
        found = module(x)
    for row, (content, instruction) in enumerate(BLOCKS_OF.tolist()):
        for token in range(4):
            now = x[row, token]
            base = module.base_layer.weight @ now + module.base_layer.bias
            o_c = 2.0 * module.b[0, content] @ (module.a[0, content] @ now)
            o_i = 2.0 * module.b[1, instruction] @ (module.a[1, instruction] @ now)
            e_c, e_i = torch.exp(module.f[0] @ o_c), torch.exp(module.f[1] @ o_i)
            expected = base + e_c / (e_c + e_i) * o_c + e_i / (e_c + e_i) * o_i
            torch.testing.assert_close(found[row, token], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(module(x), module.base_layer(x))  # nothing is chosen any more


def test_a_gradient_reaches_the_chosen_blocks_alone() -> None:
    choice = Choice()
    module = filled(SeparableLinear(nn.Linear(5, 7), 3, choice, torch.Generator().manual_seed(0)))
    with choice.of(BLOCKS_OF):
        module(torch.randn(2, 4, 5)).square().sum().backward()
    for parameter in (module.a, module.b):
        reached = parameter.grad.flatten(2).any(2)  # type: ignore[union-attr]
        assert reached.tolist() == [[True, False, True, False], [False, True, False, True]]
    assert module.f.grad.any(1).all()  # type: ignore[union-attr]
    assert module.base_layer.weight.grad is None and module.base_layer.bias.grad is None


def test_a_base_in_bfloat16_stays_near_float32() -> None:
    choice = Choice()
    module = filled(SeparableLinear(nn.Linear(32, 48), 2, choice, torch.Generator().manual_seed(0)))
    x = torch.randn(2, 4, 32).bfloat16()
    with choice.of(BLOCKS_OF):
        expected = module(x.float())
        module.base_layer.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            trained = module(x)
        served = module(x)
    assert module.a.dtype == torch.float32 and trained.dtype == served.dtype == torch.bfloat16
    for found in (trained, served):
        assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_gates_are_fixed_by_the_seed_and_the_first_task() -> None:
    first, later = torch.randn(40, SETS, 12) * 3 + 5, torch.randn(40, SETS, 12)
    gates = Gates(12, 0)
    gates.see(first)
    blocks = gates(later)
    by_hand = (later - first.mean(0)) / first.std(0, correction=0)
    for each in range(SETS):
        assert torch.equal(blocks[:, each], (by_hand[:, each] @ gates.projections[each].T).argmax(1))
    gates.see(later)
    assert torch.equal(gates(later), blocks) and blocks.unique().numel() > 1
    other = Gates(12, 0)
    other.see(first)
    assert torch.equal(other(later), blocks) and gates.bytes == 4 * 12 * SETS * (BLOCKS + 2)


def test_what_hardly_differs_does_not_choose_alone() -> None:
    first = torch.randn(40, SETS, 12)
    first[:, :, 0] = 7.0
    gates = Gates(12, 0)
    gates.see(first)
    assert (gates.deviation[:, 0] > 0.05).all() and torch.equal(
        gates.deviation[:, 1:], first.std(0, correction=0)[:, 1:]
    )


def test_before_the_first_task_it_is_the_base(make: Callable[[], SMoLora]) -> None:
    learner = make()
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        found = learner.answering(torch.randn(2, SETS, 32))(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(learner.base.config._name_or_path).eval()(ids).logits
    assert torch.equal(found, expected)
    wrapped = [name for name, module in learner.base.named_modules() if isinstance(module, SeparableLinear)]
    assert len(wrapped) == 3 * 7 and not any("head" in name for name in wrapped)


def test_a_task_leaves_blocks_that_it_does_not_choose_as_they_were(make: Callable[[], SMoLora]) -> None:
    learner, again = make(), make()
    names = [name for name, module in learner.base.named_modules() if isinstance(module, SeparableLinear)]
    for task, start, count in (("ayes", 10, 12), ("nos", 80, 2)):  # two questions choose two blocks of a set at most
        rows, apart = rows_of(start, task, count), rows_of(start + 20, task, 6)
        before = {name: {k: v.clone() for k, v in _module(learner, name).named_parameters()} for name in names}
        learner.learn(task, rows, apart)
        chosen = learner.gates(learner._asked(learner._encoded(task, rows)))
        moved = torch.zeros(SETS, BLOCKS, dtype=torch.bool)
        for name in names:
            module = _module(learner, name)
            assert torch.equal(module.base_layer.weight, before[name]["base_layer.weight"])
            moved |= (module.b != before[name]["b"]).flatten(2).any(2)
            for each in range(SETS):
                for block in set(range(BLOCKS)) - set(chosen[:, each].tolist()):
                    assert torch.equal(module.a[each, block], before[name]["a"][each, block])
                    assert torch.equal(module.b[each, block], before[name]["b"][each, block])
        assert moved.tolist() == [[block in chosen[:, each] for block in range(BLOCKS)] for each in range(SETS)]
        again.learn(task, rows, apart)
    assert moved.any(1).all() and not moved.all(1).any()
    for one, other in zip(learner.parameters, again.parameters, strict=True):
        assert torch.equal(one, other)


def test_the_best_step_is_what_comes_out(make: Callable[[], SMoLora], monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make()
    monkeypatch.setattr(smolora, "VALIDATE_EVERY", 1)
    found: list[float] = []
    validate = SMoLora._validate

    def listen(self: SMoLora, apart: smolora._Chosen) -> float:
        found.append(validate(self, apart) if len(found) < 3 else 1e9)  # all later steps are bad
        return found[-1]

    monkeypatch.setattr(SMoLora, "_validate", listen)
    rows, apart = rows_of(10, "aye aye"), rows_of(30, "aye aye", 6)
    learner.learn("ayes", rows, apart)
    held_out = learner._encoded("ayes", apart)
    state = smolora._Chosen(held_out, learner.gates(learner._asked(held_out)))
    assert len(found) > 4 and found[2] < found[0]
    assert validate(learner, state) == pytest.approx(min(found))


def test_the_rank_is_shared_and_text_is_needed(make: Callable[[], SMoLora]) -> None:
    assert block_rank(16) == 2 and SCALE == 2.0
    for bad in (0, 12):
        with pytest.raises(ConfigError, match=f"multiple of 8, not {bad}"):
            block_rank(bad)
    learner = make()
    assert learner.rank == 16 and learner.base.model.layers[0].mlp.up_proj.a.shape == (SETS, BLOCKS, 2, 32)
    learner.how = dataclasses.replace(learner.how, max_length=2)
    with pytest.raises(DataError, match="an answer within 2 tokens"):
        learner.learn("ayes", rows_of(10, "aye"), rows_of(30, "aye"))


def test_a_loss_that_is_not_finite_ends_the_task(make: Callable[[], SMoLora]) -> None:
    learner = make()
    learner.parameters[1].data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="became nan and .* at step 1"):
        learner.learn("ayes", rows_of(10, "aye"), rows_of(30, "aye"))


def _module(learner: SMoLora, name: str) -> SeparableLinear:
    found = learner.base.get_submodule(name)
    assert isinstance(found, SeparableLinear)
    return found
