"""Tiny random models, and adapters written by PEFT itself."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("MOLORA_TEST_DEVICE", "cpu") == "cpu":  # kernels in Triton's interpreter: before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import copy
import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
    from tests.bounds import watch
    from tests.interpreter import hurry

    hurry()
    watch()
torch.set_num_threads(1)
DEVICE = torch.device(os.environ.get("MOLORA_TEST_DEVICE", "cpu"))  # benchmarks/gpu.sh runs the equalities on a GPU


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """What a command had the collector pass over is the next test's rubbish."""
    yield
    gc.unfreeze()


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SMALL, "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6}
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}


def make_base(family: str = "llama", seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().to(DEVICE)
    model.generation_config.pad_token_id = 0
    return model


def write_adapter(base: transformers.PreTrainedModel, folder: Path, seed: int, **settings: Any) -> Path:
    """A PEFT adapter with random A and B, saved by PEFT."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are deselected, and counted as such: no check is skipped that reads as passed."""
    gpu = [item for item in items if item.get_closest_marker("gpu")] if DEVICE.type == "cpu" else []
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session")
def base() -> transformers.PreTrainedModel:
    """A tiny Llama. Tests that wrap it take a copy."""
    return make_base()


@pytest.fixture(scope="session")
def adapters(base: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four adapters of different ranks, scales and targets for ``base``."""
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "math": {},
        "code": {"r": 8, "lora_alpha": 8, "use_rslora": True},
        "sage": {"r": 1, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "ada": {
            "r": 3,
            "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"o_proj": 3},
        },
    }
    return {name: write_adapter(base, root / name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items(), 1)}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(5)).to(DEVICE)
