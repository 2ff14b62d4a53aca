"""The costs of a token in docs/how-it-works.md are those of the formula, and the formula counts what models have."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from molora import Router, RouterConfig
from tools.token_costs import CONTEXT, QWEN, RANK, SMOLLM, Shape, costs, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_has_the_table() -> None:
    page = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    between = page.split("<!-- token costs -->")[1].split("<!-- /token costs -->")[0]
    assert between.strip() == table()


@pytest.mark.parametrize(("shape", "config"), [(SMOLLM, LlamaConfig), (QWEN, Qwen3Config)])
def test_what_is_counted_is_there(shape: Shape, config: type) -> None:
    settings = config(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_width,
        vocab_size=shape.vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings)
        weights = sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Linear))
        peft = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapter = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
    found = costs(shape)
    assert found["the base's weights"][0] == 2 * weights
    assert found[f"each adapter that acts, rank {RANK} on every linear module"][1] == 2 * adapter
    cache = 2 * shape.layers * shape.kv_heads * shape.head_width * CONTEXT
    assert found[f"attention to {CONTEXT} tokens"][1] == 2 * cache


def test_the_router_is_of_the_starters_sizes() -> None:
    config = RouterConfig(reads=0, width=128, hidden=SMOLLM.router_hidden, decays=(0.8, 0.95))
    router = Router(config, [f"layer/{n}" for n in range(SMOLLM.rows)], SMOLLM.hidden)
    weights = sum(m.weight.numel() for m in router._parts[0].modules() if isinstance(m, torch.nn.Linear))
    read = SMOLLM.hidden * 128  # folded into the table
    assert costs(SMOLLM)["the router"][0] == 2 * (weights - read)
