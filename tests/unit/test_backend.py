"""Where the kernels cannot serve, torch does, and says so once."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel, Stack, StackLayer
from molora import backend as backend_module
from molora.backend import backend_for
from molora.errors import ConfigError
from tests.conftest import make_base

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "_broken", [])


@pytest.fixture
def model(adapters: dict[str, Path]) -> MoLoRAModel:
    return MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]), backend="triton")


def expected(adapters: dict[str, Path], ids: torch.Tensor) -> torch.Tensor:
    plain = MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]), backend="torch")
    with torch.no_grad():
        return plain(ids, selection={"any": "math"}).logits


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_for(torch.device("cpu")) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert backend_for(CUDA) == "triton"
    monkeypatch.setattr(backend_module, "find_spec", lambda _: None)
    assert backend_for(CUDA) == "torch"


def test_an_old_gpu_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    with pytest.warns(UserWarning, match="Old GPU is older"):
        assert backend_for(CUDA) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for(CUDA) == "torch"


def test_a_triton_that_cannot_compile(
    model: MoLoRAModel, adapters: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molora_kernels import paged

    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    def broken(*_: Any) -> None:
        raise CompilationError("no such target")

    monkeypatch.setattr(paged, "shrink_paged", broken)
    with torch.no_grad(), pytest.warns(UserWarning, match="no such target.*plain torch"):
        found = model(ids, selection={"any": "math"}).logits
    torch.testing.assert_close(found, expected(adapters, ids), rtol=1e-5, atol=1e-6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model(ids, selection={"any": "math"}).logits
    assert torch.equal(again, found)


def test_other_errors_are_not_swallowed(model: MoLoRAModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from molora_kernels import paged

    def wrong(*_: Any) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(paged, "shrink_paged", wrong)
    with torch.no_grad(), pytest.raises(ValueError, match="a mistake of ours"):
        model(ids, selection={"any": "math"})


def test_pages_without_a_gpu(
    model: MoLoRAModel, adapters: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that lie in pages on a CPU without the interpreter: torch reads them there."""
    monkeypatch.setattr("molora.groups.AdapterGroup.serves", lambda *_: False)
    with torch.no_grad():
        found = model(ids, selection={"any": "math"}).logits
    torch.testing.assert_close(found, expected(adapters, ids), rtol=1e-5, atol=1e-6)


def test_another_device_another_backend(
    adapters: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]))
    for name in ("triton", "torch", "triton"):
        monkeypatch.setattr("molora.adapted.backend_for", lambda _, name=name: name)
        model.to(torch.float32)
        wrapped = [module for module in model.base.modules() if type(module).__name__ == "MoLoRALinear"]
        assert all((module.group is not None) == (name == "triton") for module in wrapped)
        assert all(bool(module.factors) == (name == "torch") for module in wrapped)
        with torch.no_grad():
            found = model(ids[:, :3], selection={"any": "math"}).logits
        torch.testing.assert_close(found, expected(adapters, ids[:, :3]), rtol=1e-5, atol=1e-6)


def test_an_unknown_backend(adapters: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="There is no backend 'cuda'.*torch or triton"):
        MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]), backend="cuda")
