"""Losses of tokens in a few rows of logits at a time: values and gradients against torch's own cross-entropy."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from molora_training import token_losses
from molora_training.data import IGNORED
from molora_training.token_losses import TokenLosses

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
GEMMA = Gemma2Config(**SIZES, final_logit_softcapping=2.0, sliding_window=32)


def tiny(config: Any = None) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).double()
    nn.init.normal_(base.get_output_embeddings().weight, std=0.5)
    return base


def some() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids, labels = torch.randint(101, (3, 37)), torch.randint(101, (3, 37))
    labels[torch.rand(3, 37) < 0.4] = IGNORED
    labels[2] = IGNORED
    return ids, labels


def with_lora(base: Any, modules: Any = ("q_proj", "down_proj")) -> Any:
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config).double()


def plainly(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def gradients(model: Any, losses: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad((losses * weights).sum(), [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("chunk", [1, 16, 1024])
def test_losses_and_gradients_are_those_of_all_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK", chunk)
    base, (ids, labels) = tiny(), some()
    model, weights = with_lora(base), torch.rand(3, 37, dtype=torch.float64)
    losses = TokenLosses(base)
    assert losses.plain
    found, wanted = losses(lambda: model(input_ids=ids, use_cache=False), labels), plainly(model, ids, labels)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)  # the losses themselves are float32
    for mine, theirs in zip(gradients(model, found, weights), gradients(model, wanted, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert model(input_ids=ids, use_cache=False).logits.shape == (3, 37, 101)  # the head is there again


def test_rows_that_are_not_asked_for_are_the_same_whether_they_are_left_out_or_not() -> None:
    """What a GPU computes, where nobody knows how many tokens are asked for, is computed here by hand."""
    torch.manual_seed(3)
    _, labels = some()
    hidden = torch.randn(3 * 37, 32, requires_grad=True)
    weight, bias = torch.randn(101, 32), torch.randn(101)
    found = token_losses._Chunked.apply(hidden, weight, bias, labels.flatten())
    wanted = nn.functional.cross_entropy(
        nn.functional.linear(hidden, weight, bias), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    torch.testing.assert_close(found, wanted)
    (mine,), (theirs,) = torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(mine, theirs)
    assert not mine[labels.flatten() == IGNORED].any()


@pytest.mark.parametrize("case", ["plain", "soft cap", "head with an adapter"])
def test_divergences_and_gradients_are_those_of_all_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK", 16)
    base, (ids, _) = tiny(GEMMA if case == "soft cap" else None), some()
    model = with_lora(base, ("q_proj", "lm_head") if case == "head with an adapter" else ("q_proj",))
    weights, tokens = torch.rand(3, 37, dtype=torch.float64), TokenLosses(base)
    assert tokens.chunks == (case == "plain")

    def say() -> Any:
        return model(input_ids=ids, use_cache=False)

    with torch.no_grad(), model.disable_adapter():
        taught, q = tokens.states(say), say().logits.log_softmax(-1)
    found = tokens.divergences(tokens.states(say), taught)
    wanted = (q.exp() * (q - say().logits.log_softmax(-1))).sum(-1)
    assert found.shape == (3, 37) and wanted.mean() > 1e-6
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)  # they themselves are float32
    for mine, theirs in zip(gradients(model, found, weights), gradients(model, wanted, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["soft cap", "head with an adapter", "head that learns", "head with a hook"])
def test_a_head_that_is_not_the_last_word_is_left_as_it_is(case: str) -> None:
    base, (ids, labels) = tiny(GEMMA if case == "soft cap" else None), some()
    model = with_lora(base, ("q_proj", "lm_head") if case == "head with an adapter" else ("q_proj",))
    losses = TokenLosses(base)
    assert losses.plain == (case in ("head that learns", "head with a hook"))
    if case == "head that learns":
        base.get_output_embeddings().weight.requires_grad_(True)
    if case == "head with a hook":
        base.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: 2.0 * output)
    found, wanted = losses(lambda: model(input_ids=ids, use_cache=False), labels), plainly(model, ids, labels)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        gradients(model, found.sum(), torch.ones(())), gradients(model, wanted.sum(), torch.ones(())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_products_are_bfloat16s() -> None:
    base, (ids, labels) = tiny().float(), some()
    losses = TokenLosses(base)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(lambda: base(input_ids=ids, use_cache=False), labels)
        base.requires_grad_(False)
        wanted = plainly(base, ids, labels)
        again = losses(lambda: base(input_ids=ids, use_cache=False), labels)
    assert found.dtype == again.dtype == torch.float32
    torch.testing.assert_close(again, wanted.float(), rtol=2e-3, atol=2e-3)


def test_the_head_is_there_again_after_an_error() -> None:
    base, (ids, labels) = tiny().requires_grad_(False), some()
    losses = TokenLosses(base)

    def failing() -> SimpleNamespace:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        losses(failing, labels)
    assert base(input_ids=ids, use_cache=False).logits.shape[-1] == 101
