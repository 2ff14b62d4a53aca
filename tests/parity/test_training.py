"""A router's gradient through the kernels is that through plain PyTorch, with layers that are run again or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRALinear, MoLoRAModel
from molora_kernels import hot
from tests.conftest import make_base, write_adapter
from tests.parity.test_equalities import close, make_routed

NAMES = ("sage", "math", "code", "ada")


# Ranks up to which training multiplies all. The other way takes minutes in an interpreter.
@pytest.mark.parametrize("hot", [1024, pytest.param(0, marks=pytest.mark.gpu)], ids=["hot", "by slot"])
def test_a_routers_gradient_by_kernels_and_with_checkpointing(
    base: Any, adapters: dict[str, Path], ids: torch.Tensor, hot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora_kernels.forms.HOT_TRAINED", hot)
    expected = None
    for backend in ("torch", "triton"):
        monkeypatch.setattr("molora.adapted.backend_for", lambda _, backend=backend: backend)
        model = make_routed(base, adapters, weights="softmax", top_k=2)
        expected = router_gradient(model, ids) if expected is None else expected
        assert expected.abs().max() > 0
        close(router_gradient(model, ids), expected)
        model.base.gradient_checkpointing_enable({"use_reentrant": False})
        model.base.model.train()  # checkpointing is on in training mode only; there is no dropout
        close(router_gradient(model, ids), expected)


@pytest.mark.parametrize("watched", [False, True], ids=["as one step", "watched"])
def test_a_module_and_few_adapters_are_one_step_of_the_way_back(
    watched: bool, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("qwen2")  # q, k and v have a bias
    adapters = {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(NAMES)}
    monkeypatch.setattr("molora.adapted.backend_for", lambda _: "torch")
    expected = router_gradient(make_routed(base, adapters), ids)
    monkeypatch.setattr("molora.adapted.backend_for", lambda _: "triton")
    model, seen, steps = make_routed(base, adapters), [], []
    whole = hot.linear_hot
    monkeypatch.setattr(hot, "linear_hot", lambda *a: steps.append(1) or whole(*a))
    modules = [module for module in model.base.modules() if isinstance(module, MoLoRALinear)]
    if watched:  # somebody sees the outputs of the base's own modules
        for module in modules:
            module.base_layer.register_forward_hook(lambda *_: seen.append(1))
    close(router_gradient(model, ids), expected)
    assert (len(seen), len(steps)) == ((len(modules), 0) if watched else (0, len(modules)))


def router_gradient(model: MoLoRAModel, ids: torch.Tensor) -> torch.Tensor:
    model.train()
    model.router.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return model.router.parts[0].output.weight.grad.clone()
