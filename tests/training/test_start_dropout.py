"""An adapter that learns to do without itself at the start acts there like the base in every other example."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from molora import MoLoRAModel
from molora.errors import ConfigError
from molora_training.adapter_settings import LoraShape
from molora_training.data import IGNORED, Batch
from molora_training.evaluate import LAYER, LabelRouter, routed_by
from molora_training.start_dropout import StartDropout
from tests.unit.spoken import make_spoken

TOKENS = 3


@pytest.fixture
def models(tmp_path: Path) -> tuple[MoLoRAModel, PeftModel, StartDropout]:
    """A MoLoRA, and its base with PEFT's adapter "math" that leaves out the first tokens."""
    routed = make_spoken(tmp_path)
    base = type(routed.base)(copy.deepcopy(routed.base.config))
    base.load_state_dict(routed.base.state_dict())
    peft = PeftModel.from_pretrained(base, tmp_path / "math", is_trainable=True)
    return routed, peft, StartDropout(peft, TOKENS)


def batch_of(ids: torch.Tensor, answer: int) -> Batch:
    """With an answer from that position on."""
    labels = ids.clone()
    labels[:, :answer] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels, torch.zeros_like(ids), torch.zeros_like(ids))


@torch.no_grad()
def test_every_other_example_starts_as_the_base(models: tuple[MoLoRAModel, PeftModel, StartDropout]) -> None:
    routed, peft, start = models
    ids = torch.arange(5, 89).view(7, 12)
    start.see(batch_of(ids, answer=8))
    learning, alone = peft.train()(input_ids=ids).logits, peft.eval()(input_ids=ids).logits
    torch.testing.assert_close(learning[::2], alone[::2])
    torch.testing.assert_close(alone, routed(ids, selection={LAYER: "math"}).logits, rtol=1e-4, atol=1e-5)
    oracle = LabelRouter(routed, ["math", "none"])
    labels = torch.zeros_like(ids)
    counts = set()
    for row in (1, 3, 5):
        counts.add(count := 1 + (int(ids[row].sum()) + row // 2) % TOKENS)
        labels[row, :count] = 1
    assert counts == {1, 2, 3}
    oracle.parts[0].labels = labels
    with routed_by(routed, oracle):
        expected = routed(ids, selection={LAYER: "auto"}, use_cache=False).logits
    torch.testing.assert_close(learning, expected, rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(learning[row], alone[row], atol=1e-3) for row in (1, 3, 5))


def test_its_gradient_is_of_the_tokens_at_which_it_acts(models: tuple[MoLoRAModel, PeftModel, StartDropout]) -> None:
    _, peft, start = models
    ids = torch.tensor([[5], [6]])  # at least one token is left out
    start.see(batch_of(ids, answer=1))
    peft.train()(input_ids=ids).logits[1].sum().backward()
    gradients = [p.grad for p in peft.parameters() if p.requires_grad]
    assert gradients and all(float(gradient.abs().max()) == 0 for gradient in gradients)


@pytest.mark.parametrize(("answer", "most"), [(1, 1), (2, 1), (3, 2), (9, 8), (12, 11)])
def test_a_token_that_predicts_an_answer_is_never_left_out(answer: int, most: int) -> None:
    start = StartDropout(torch.nn.Identity(), tokens=50)
    found = set()
    for number in range(60):
        ids = torch.arange(number, number + 24).view(2, 12)
        ids[1, 0] += number  # so that the sums take every remainder
        start.see(batch_of(ids, answer))
        assert start.acts is not None and start.acts.shape == (2, 12, 1) and start.acts[0].all()
        found.add(int((~start.acts[1]).sum()))
        assert start.acts[1].squeeze(1).diff().sum() <= 1  # it acts from some token on
    assert max(found) == most and found <= set(range(1, most + 1))


def test_it_is_a_number_of_tokens() -> None:
    with pytest.raises(ConfigError, match="start_dropout must not be negative"):
        LoraShape(start_dropout=-1)
