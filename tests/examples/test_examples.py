"""The scripts in examples/, each as a whole, on a tiny random base."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from tests.conftest import SMALL
from tests.unit.spoken import make_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def script(name: str) -> ModuleType:
    """A script as a module; nothing of it runs on import."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama over bytes, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {**SMALL, "vocab_size": 261, "max_position_embeddings": 2048, "eos_token_id": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_bring_your_own_adapters(base: str, tmp_path: Path) -> None:
    found = script("bring_your_own_adapters").run(base, tmp_path, {}, steps=8, texts=24, mixed=24, judged=4, epochs=4)
    assert found.peft < 1e-5 and found.reloaded
    assert found.right > 0.6  # a third by chance
    for name in ("math", "code", "log"):
        assert found.losses[f"{name} alone"][name] < found.losses["base"][name]
    assert found.losses["routed"]["all"] < found.losses["base"]["all"]
