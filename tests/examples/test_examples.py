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


def test_support_desk(base: str, tmp_path: Path) -> None:
    desk = script("support_desk")
    how = desk.Schedule(learning_rate=3e-2, epochs=3, batch_tokens=512)
    sizes = {"products": 4, "rank": 2, "last": 2, "mixed": 12, "router_epochs": 60, "per_product": 2}
    found = desk.run(base, tmp_path, how=how, dtype=torch.float32, **sizes)
    assert found.right > 0.5  # a quarter by chance
    assert found.passes == found.tokens  # the prompt and the first token are one
    assert found.new_right > 0.3 and found.others_right > 0.5  # a fifth by chance
    assert set(found.answers) == {"base", "routed", "right adapter by name", "all merged into one"}


def test_what_the_upper_layers_learn_is_right_in_the_whole(base: str) -> None:
    """The states of a table give the logits that the tokens give."""
    desk = script("support_desk")
    model, tokenizer = desk.load_base(base, dtype=torch.float32)
    rows = [
        desk.encode_within(one.examples(desk.ASKED), tokenizer, 1024, [one.label]) for one in desk.make_products(2, 0)
    ]
    upper, states = desk.upper_half(model, 1, rows)
    with torch.no_grad():
        whole = model(rows[1][2].input_ids[None]).logits
        torch.testing.assert_close(upper(states[1][2].input_ids[None]).logits, whole, rtol=1e-5, atol=1e-5)


def test_companion(base: str, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-2, "epochs": 4, "batch_tokens": 512, "max_forgetting": 0.5, "dtype": "float32"}
    found = script("companion").run(base, tmp_path, conversations=2, settings=settings)
    first, second = found.updates
    assert first.promoted and first.learnt.after < first.learnt.before
    assert second.promoted and second.parent == first.version and second.kept is not None and second.replayed > 0
    assert found.served["ten"] == second.version
    assert found.served["rolled back"] == first.version
    assert found.forgotten.gone == 8 and found.served["forgotten"] == found.forgotten.version
    assert found.forgotten.left is None or found.forgotten.left < 1
