"""PEFT's Arrow and X-LoRA as contenders: they are what their papers say, and the base is as before afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from molora.adapter import Adapter
from molora.errors import ConfigError, NonFiniteError
from molora_training.data import Encoded, collate
from molora_training.evaluate import losses_of
from molora_training.peft_routers import Logits, arrow, train_xlora
from tests.conftest import DEVICE, make_base, write_adapter
from tests.training.test_soup import ROWS, assert_as_new, taught

MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters whose first rank is by far the strongest: power iteration finds its direction well."""
    root = tmp_path_factory.mktemp("three")
    folders = {
        name: write_adapter(make_base(), root / name, seed, lora_alpha=4 + 2 * seed)
        for seed, name in enumerate(("math", "code", "law"), 1)
    }
    for folder in folders.values():
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                tensor[0] *= 5
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders


def seen(logits: Logits, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the adapters get and add in MODULE: x [tokens, in] and delta [tokens, out], float64."""
    found: list[torch.Tensor] = []

    def keep(module: Any, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
        found[:] = [inputs[0], y - module.base_layer(inputs[0])]

    batch = collate(rows, 0).to(DEVICE)
    handle = logits.model.base_model.model.get_submodule(MODULE).register_forward_hook(keep)
    with torch.no_grad():
        logits(batch)
    handle.remove()
    there = batch.attention_mask.bool()
    return found[0][there].double().cpu(), found[1][there].double().cpu()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_goes_by_the_strongest_direction(three: dict[str, Path], top_k: int) -> None:
    base = make_base()
    with arrow(base, three, top_k) as logits:
        x, delta = seen(logits, ROWS)
    assert_as_new(base)
    products = []
    for folder in three.values():
        own = Adapter.load(folder).modules[MODULE]
        products.append((own.B.double() @ own.A.double(), own.scale))
    directions = torch.stack([torch.linalg.svd(product).Vh[0] for product, _ in products])
    best = (x @ directions.T).abs().topk(top_k, -1)
    weights = torch.zeros(len(x), len(three), dtype=torch.float64).scatter(1, best.indices, best.values.softmax(-1))
    expected = sum(weights[:, index, None] * scale * (x @ product.T) for index, (product, scale) in enumerate(products))
    assert isinstance(expected, torch.Tensor) and (delta - expected).norm() < 1e-4 * expected.norm()
    assert len(best.indices.unique()) > 1  # tokens differ in where they go


def test_arrow_of_one_adapter_is_the_adapter(three: dict[str, Path]) -> None:
    batch = collate(ROWS, 0).to(DEVICE)
    with torch.no_grad():
        with arrow(make_base(), {"math": three["math"]}, top_k=1) as logits:
            found = logits(batch)
        expected = Logits(PeftModel.from_pretrained(make_base(), str(three["math"])))(batch)
        there = batch.attention_mask.bool()
        assert torch.allclose(found[there], expected[there], atol=1e-4)
        assert not torch.allclose(found[there], make_base()(batch.input_ids).logits[there], atol=1e-1)


def test_arrow_refuses_what_does_not_fit(three: dict[str, Path], tmp_path: Path) -> None:
    base = make_base()
    wide = write_adapter(base, tmp_path / "wide", 5, r=8)
    some = write_adapter(base, tmp_path / "some", 6, layers_to_transform=[0], target_modules=["q_proj"])
    for adapters, top_k, why in (
        ({**three, "wide": wide}, 2, "one rank on the same modules; wide differs"),
        ({**three, "some": some}, 2, "one rank on the same modules; some differs"),
        ({"some": some}, 1, r"none is on model\.layers\.1\.self_attn\.q_proj"),
        (three, 4, "1 to 3 of 3"),
        (three, 0, "1 to 3 of 3"),
        ({}, 1, "give one at least"),
    ):
        with pytest.raises(ConfigError, match=why), arrow(base, adapters, top_k):
            pass
        assert_as_new(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xlora_learns_in_its_classifier_alone(three: dict[str, Path], dtype: torch.dtype) -> None:
    found, weights, rows = [], [], taught([three["math"], three["code"]])
    for steps in (0, 30):
        base = make_base().to(dtype)
        with train_xlora(base, three, rows, 0, steps=steps, learning_rate=0.05, batch_tokens=96) as logits:
            found.append(losses_of(logits, rows, 2, 0, DEVICE))
            classifier = logits.model.base_model.internal_xlora_classifier
            weights.append({name: p.detach().clone() for name, p in classifier.named_parameters()})
            for index, folder in enumerate(three.values()):
                for name, own in Adapter.load(folder).modules.items():
                    layer = logits.model.base_model.model.get_submodule(name)
                    assert torch.equal(layer.lora_A[str(index)].weight.cpu(), own.A.to(dtype).float())
                    assert torch.equal(layer.lora_B[str(index)].weight.cpu(), own.B.to(dtype).float())
            trainable = {name for name, p in logits.model.named_parameters() if p.requires_grad}
            assert trainable and all("internal_xlora_classifier" in name for name in trainable)
            if steps:  # peft issue #2015: in some uses no gradient reached it
                assert all(p.grad is not None and p.grad.abs().max() > 0 for p in classifier.parameters())
        if dtype == torch.float32:
            assert_as_new(base)
    assert found[1].mean < found[0].mean - 0.1
    assert (found[1].loss.sum(0) < found[0].loss.sum(0)).all()  # in both domains
    assert all(not torch.equal(weights[1][name], start) for name, start in weights[0].items())
    assert all(tensor.dtype == torch.float32 for tensor in weights[1].values())


def test_xlora_weighs_every_adapter_in_every_module(three: dict[str, Path]) -> None:
    base = make_base()
    with train_xlora(base, three, ROWS, 0, steps=5, learning_rate=1e-3, seed=1, depth=2) as logits:
        x, delta = seen(logits, ROWS)
        classifier = logits.model.base_model.internal_xlora_classifier.double().cpu()
        layers = [name for name, module in logits.model.base_model.model.named_modules() if hasattr(module, "lora_A")]
        dense = [layer for layer in classifier.layers if not isinstance(layer, torch.nn.Dropout)]
    batch = collate(ROWS, 0).to(DEVICE)
    with torch.no_grad():
        hidden = base(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states[-1]
        z = hidden[batch.attention_mask.bool()].double().cpu()
        for layer in dense:
            z = torch.nn.functional.linear(z, layer.weight, layer.bias) if hasattr(layer, "weight") else layer(z)
    weights = z.view(len(x), len(layers), len(three))[:, layers.index(MODULE)].softmax(-1)
    expected = torch.zeros_like(delta)
    for index, folder in enumerate(three.values()):
        own = Adapter.load(folder).modules[MODULE]
        expected += weights[:, index, None] * own.scale * (x @ own.A.double().T @ own.B.double().T)
    assert (delta - expected).norm() < 1e-4 * expected.norm()
    assert weights.std(0).min() > 0


def test_xlora_leaves_nothing_behind_where_it_fails(three: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    norm = base.model.norm.weight.detach().clone()
    base.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="nan at step 1 of X-LoRA"), train_xlora(base, three, ROWS, 0):
        pass
    base.model.norm.weight.data.copy_(norm)
    assert_as_new(base)
    monkeypatch.setattr("peft.tuners.xlora.model.XLoraClassifier", None)  # PEFT itself, with adapters already in
    with pytest.raises(TypeError), train_xlora(base, three, ROWS, 0):
        pass
    assert_as_new(base)
