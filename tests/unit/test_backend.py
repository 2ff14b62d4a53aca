"""Where the kernels cannot serve, torch does, and says so once."""

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import CompileConfig

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora import backend as backend_module
from molora.adapted import MegaBlocksGroup
from molora.backend import backend_for
from molora.compose.joint import Basis
from molora.errors import BackendError, ConfigError
from molora_kernels import Factors, megablocks
from molora_kernels.order import PagedPlan
from tests.conftest import DEVICE, make_base

CUDA = torch.device("cuda")
AUTO = {"kind": "auto", "user": "auto"}


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


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """By the norm: single logits near zero are sums of larger terms, whose order is another one in pages."""
    assert (found - expected).norm() <= 1e-5 * expected.norm()


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
    assert_same(found, expected(adapters, ids))
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
    assert_same(found, expected(adapters, ids))


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
        assert_same(found, expected(adapters, ids[:, :3]))


def test_an_unknown_backend(adapters: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="There is no backend 'cuda'.*torch or triton or megablocks"):
        MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]), backend="cuda")


def test_megablocks_is_never_chosen_by_the_device(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks, "load", lambda: pytest.fail("MegaBlocks was asked for"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert backend_for(CUDA) == "triton"
    stack = Stack([StackLayer("any", {"math": adapters["math"]})])
    for backend in (None, "torch", "triton"):
        model = MoLoRAModel.from_base(make_base(), stack, backend=backend)
        assert not any(isinstance(group, MegaBlocksGroup) for group in model.adapted.groups.values())


def test_megablocks_that_is_not_installed(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megablocks, "find_spec", lambda _: None)
    megablocks.load.cache_clear()
    with pytest.raises(BackendError, match=r"not installed(.|\n)*--no-build-isolation megablocks==0.10.0 stanford-stk"):
        MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"math": adapters["math"]})]), backend="megablocks")


@pytest.mark.skipif(find_spec("megablocks") is None, reason="MegaBlocks is optional and is not installed")
class TestMegaBlocks:
    """A model that asked for MegaBlocks is the model of plain torch."""

    @pytest.fixture
    def models(self, adapters: dict[str, Path]) -> list[MoLoRAModel]:
        stack = Stack([StackLayer("kind", {"math": adapters["math"], "sage": adapters["sage"]}),
                       StackLayer("user", {"ada": adapters["ada"], "code": adapters["code"]}, top_k=2)])  # fmt: skip
        router = RouterConfig(width=8, hidden=16, weights="softmax")
        made = [MoLoRAModel.from_base(make_base(), stack, router, backend=name) for name in ("megablocks", "torch")]
        with torch.no_grad():
            for model in made:
                generator = torch.Generator().manual_seed(3)
                for parameter in model.router.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        return made

    def test_a_forward(self, models: list[MoLoRAModel], ids: torch.Tensor) -> None:
        with torch.no_grad():
            found, expected = (model(ids[:, :5], selection=AUTO).logits for model in models)
        assert_same(found, expected)

    def test_the_router_s_gradient(self, models: list[MoLoRAModel], ids: torch.Tensor) -> None:
        ids, gradients = ids[:2, :5], []
        for model in models:
            with torch.no_grad():
                model(ids, selection=AUTO)
            model.train()
            model(ids, labels=ids, selection=AUTO).loss.backward()
            copy.deepcopy(model.adapted.orders)  # holds nothing of the graph
            assert model.router is not None
            gradients.append({name: p.grad for name, p in model.router.named_parameters() if p.grad is not None})
        assert all(gradient.norm() > 1e-4 for gradient in gradients[1].values())
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)

    def test_a_gradient_after_inference(self, models: list[MoLoRAModel], ids: torch.Tensor) -> None:
        model = models[0]
        with torch.inference_mode():
            model(ids[:2, :3], selection={"kind": "math"})
        group = model.adapted.groups["model.layers.0.self_attn.q_proj"]
        slots = torch.zeros(6, 1, dtype=torch.int32, device=DEVICE)
        x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
        plan = PagedPlan(slots, torch.ones(6, 1, device=DEVICE))
        group.add(torch.zeros(6, 32, device=DEVICE), x, x, plan, 0).sum().backward()
        A, B = group.pages.factors(0)[0]
        torch.testing.assert_close(x.grad, (B.sum(1) @ A).expand(6, -1), rtol=1e-4, atol=1e-5)

    def test_compressed_ones_beside_others(self, models: list[MoLoRAModel]) -> None:
        group = models[0].adapted.groups["model.layers.0.self_attn.q_proj"]
        basis, core = Basis(torch.randn(32, 10), torch.randn(32, 10)), Factors(torch.randn(4, 10), torch.randn(4, 10))
        slots = torch.tensor([[0], [1], [9]] * 2, dtype=torch.int32, device=DEVICE)
        x, plan = torch.randn(6, 32, device=DEVICE), PagedPlan(slots, torch.ones(6, 1, device=DEVICE))
        group.put(9, 0, core, basis=basis)
        for others in (True, False):
            with torch.no_grad():
                found = group.add(torch.zeros(6, 32, device=DEVICE), x, x, plan, 0)
            factors = group.factors(0, range(16))
            assert (len(factors) > 1) == others
            for row, (slot,) in enumerate(slots.tolist()):
                A, B = factors.get(slot, Factors(x.new_zeros(1, 32), x.new_zeros(1, 32)))
                torch.testing.assert_close(found[row], x[row] @ A.T @ B, rtol=1e-3, atol=1e-4)
            for slot in set(factors) - {9}:
                group.put(slot, 0, None)

    def test_another_dtype(self, models: list[MoLoRAModel], ids: torch.Tensor) -> None:
        """Nothing of the old dtype, or device, is kept."""
        model = models[0]
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                model.to(dtype)(ids[:1, :2], selection={"kind": "math"})
            groups = [group for group in model.adapted.groups.values() if isinstance(group, MegaBlocksGroup)]
            assert groups and {stack.A.dtype for group in groups for stack in group._stacks.values()} == {dtype}

    def test_a_live_stack(self, models: list[MoLoRAModel], adapters: dict[str, Path], ids: torch.Tensor) -> None:
        logits = []
        for model in models:
            with torch.no_grad():
                ids = ids[:1, :5]
                model(ids, selection={"kind": "math"})
                model.replace_adapter("kind", "math", adapters["code"])
                first = model(ids, selection={"kind": "math"}).logits
                model.remove_adapter("user", "ada")
                model.add_adapter("user", "new", adapters["math"])
                model.to(torch.float64).to(torch.float32)
                logits.append(torch.stack([first, model(ids, selection={"kind": "sage", "user": "new"}).logits]))
        assert_same(*logits)

    def test_generation(self, models: list[MoLoRAModel], ids: torch.Tensor) -> None:
        compiled = CompileConfig()
        compiled._compile_all_devices = True  # generate asks for a captured step on accelerators alone
        for options in ({"compile_config": compiled}, {}):
            found, expected = (
                model.generate(ids[:2, :3], selection={"kind": "math", "user": "ada"}, max_new_tokens=3, **options)
                for model in models
            )
            assert torch.equal(found, expected)
