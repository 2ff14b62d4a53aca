"""Adapters of a compressed store, run in their compressed form, against PEFT with what the store exports."""

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import CompileConfig

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.adapter import Adapter, SharedWeights
from molora.checks import check_fits
from molora.commands.info import describe
from molora.compose.joint import Basis
from molora.compose.store import CompressedStore, compress
from molora.decode import DecodeStep
from molora.errors import AdapterNotFoundError, UnsupportedAdapterError
from molora.layer import MoLoRALinear
from molora.loading import load_adapter
from molora.step_routes import StepRoutes
from molora_kernels.linear import _linear_kernel
from tests.conftest import DEVICE
from tests.parity.test_equalities import close

BACKENDS = ["torch", "triton"]
TOKENS = {"torch": 17, "triton": 3}  # the interpreter is slow
SELECTIONS: list[dict[str, Any]] = [
    {"domain": "math", "user": "ada"},
    {"domain": {"math": 0.7, "code": -0.5}, "user": None},
    {"domain": None, "user": "sage"},
]


@pytest.fixture(scope="module")
def store(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> CompressedStore:
    """Two clusters, and bases too small for what is random: the store's adapters are not those that came."""
    folder = tmp_path_factory.mktemp("compressed") / "store"
    compress(adapters, folder, basis=10, clusters=2, most_error=1.0, dtype=torch.float32)
    return CompressedStore.load(folder)


@pytest.fixture(scope="module")
def exported(store: CompressedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    for name in store.names:
        store.export(name, root / name)
    return {name: root / name for name in store.names}


def stack_of(paths: dict[str, Path]) -> Stack:
    return Stack(
        [
            StackLayer("domain", {name: paths[name] for name in ("math", "code")}, top_k=2),
            StackLayer("user", {name: paths[name] for name in ("ada", "sage")}),
        ]
    )


def routed(base: Any, paths: dict[str, Path], backend: str | None = None) -> MoLoRAModel:
    torch.manual_seed(2)
    model = MoLoRAModel.from_base(
        copy.deepcopy(base), stack_of(paths), RouterConfig(hidden=16, weights="softmax"), backend=backend
    )
    for part in model.router.parts:  # type: ignore[union-attr]
        torch.nn.init.normal_(part.output.weight, std=1.0)
    return model


def test_a_stack_file_names_a_whole_store(store: CompressedStore, tmp_path: Path) -> None:
    (tmp_path / "stack.yaml").write_text(f"layers: [{{name: user, adapters: {store.folder}}}]")
    found = Stack.load(tmp_path / "stack.yaml")["user"].adapters
    assert {name: Path(path) for name, path in found.items()} == {name: store.path(name) for name in store.names}
    assert len(found) == 4


def by_peft(base: Any, exported: dict[str, Path], ids: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    if not weights:
        return base(ids).logits
    (first, path), *others = [(name, exported[name]) for name in weights]
    model = PeftModel.from_pretrained(copy.deepcopy(base), path, adapter_name=first).eval()
    for name, more in others:
        model.load_adapter(more, name)
    model.base_model.set_adapter(list(weights))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                if name in module.scaling:
                    module.scaling[name] *= weight
    return model(ids).logits


def stepped(model: MoLoRAModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Has a model generate by the step that a GPU captures; what its steps will have answered."""
    call, seen = DecodeStep.__call__, list[torch.Tensor]()

    def kept(step: DecodeStep, ids: torch.Tensor) -> torch.Tensor:
        seen.append(call(step, ids).clone())
        return seen[-1]

    monkeypatch.setattr(DecodeStep, "__call__", kept)
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    model.base.generation_config.compile_config = compiled
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_each_sequence_has_its_adapters(
    backend: str, base: Any, store: CompressedStore, exported: dict[str, Path], ids: torch.Tensor
) -> None:
    assert len(store.manifest.clusters) == 2 and store.raw == [] and max(map(store.error, store.names)) > 0.1
    model, ids = routed(base, {name: store.path(name) for name in store.names}, backend), ids[:, : TOKENS[backend]]
    found = model(ids, selection=SELECTIONS).logits
    wanted: list[dict[str, float]] = [{"math": 1, "ada": 1}, {"math": 0.7, "code": -0.5}, {"sage": 1}]
    for row, weights in enumerate(wanted):
        close(found[row], by_peft(base, exported, ids[row : row + 1], weights)[0])
    close(model(ids, selection={"domain": None, "user": None}).logits, base(ids).logits)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_routed_and_generated_are_those_of_the_exported(
    backend: str,
    base: Any,
    store: CompressedStore,
    exported: dict[str, Path],
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = ids[:, : TOKENS[backend]]
    model = routed(base, {name: store.path(name) for name in store.names}, backend)
    plain = routed(base, exported, "torch")
    selection = {"domain": "auto", "user": ["ada"]}
    found, wanted = (one(ids, selection=selection, output_routes=True) for one in (model, plain))
    assert torch.equal(found.routes.slots, wanted.routes.slots) and found.routes.slots.unique().numel() > 2
    close(found.logits, wanted.logits)

    logits = stepped(model, monkeypatch) if backend == "triton" else []
    rows, tokens = {"torch": (3, 10), "triton": (2, 3)}[backend]
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "selection": selection}
    options |= {"eos_token_id": None}
    said = model.generate(input_ids=ids[:rows], **options)
    meant = plain.generate(input_ids=ids[:rows], **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(said, meant.sequences)
    for step, other in zip(logits, meant.logits[1:] if backend == "triton" else [], strict=True):
        close(step, other)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_beside_others_that_come_and_go(
    backend: str, base: Any, store: CompressedStore, exported: dict[str, Path], ids: torch.Tensor
) -> None:
    """Compressed and ordinary ones in one stack, one slot after the other's."""
    model, ids = routed(base, {**exported, "math": store.path("math")}, backend), ids[:, : TOKENS[backend]]
    plain = routed(base, exported, "torch")
    for place in (None, exported["math"], store.path("math")):
        if place is not None:
            model.remove_adapter("domain", "math")
            model.add_adapter("domain", "math", place)
        for name in ("math", "code") if backend == "torch" else ("math",):
            selection = {"domain": name, "user": "ada"}
            close(model(ids, selection=selection).logits, plain(ids, selection=selection).logits)
            if backend == "torch":
                options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "selection": selection}
                assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    model.remove_adapter("domain", "math")
    wrapped = [module for module in model.modules() if isinstance(module, MoLoRALinear)]
    assert wrapped and not any(module.shared for module in wrapped)
    groups = {id(group): group for group in model.adapted.groups.values()}.values()
    assert not any(group.pages.shared_runs(piece) for group in groups for piece in range(len(group.names)))
    assert not any(group.compressed(piece) for group in groups for piece in range(len(group.names)))


@torch.no_grad()
def test_steps_with_both_kinds_in_one_batch(
    base: Any, store: CompressedStore, exported: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the step that a GPU captures, after swaps of one kind for the other."""
    model, plain = routed(base, exported, "triton").eval(), routed(base, exported, "torch").eval()
    logits = stepped(model, monkeypatch)
    compressed = set[str]()
    ids = ids[:1, :3].expand(4, -1)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    options["selection"] = [
        {"domain": "auto", "user": "ada"},
        {"domain": {"math": 0.7, "code": -0.5}, "user": "sage"},
        {"domain": None, "user": None},
        {"domain": "auto", "user": None},
    ]
    for name, layer in (("code", "domain"), ("ada", "user"), ("code", "domain")):
        compressed ^= {name}
        for one, path in ((model, store.path(name) if name in compressed else exported[name]), (plain, exported[name])):
            one.remove_adapter(layer, name)
            one.add_adapter(layer, name, path)
        said = model.generate(input_ids=ids, **options)
        meant = plain.generate(input_ids=ids, **options, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(said, meant.sequences)
        close(logits[-1], meant.logits[1])
    assert len(logits) == 3


def launches(model: MoLoRAModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    """Of one decode step: kernels by name, and calls of PyTorch."""
    kernels, calls = Counter[str](), 0

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls
            calls += func not in (torch.ops.aten.view.default, torch.ops.aten.detach.default)
            return func(*args, **(kwargs or {}))

    plan = model.steps.blueprint()
    assert plan is not None
    step = DecodeStep(plan, model.adapted.groups, StepRoutes(model.routing, 2, plan.device), 2, 16)
    launched = type(_linear_kernel).run
    with monkeypatch.context() as here:

        def run(kernel: Any, *args: Any, **how: Any) -> Any:
            kernels[kernel.fn.__name__] += 1
            with _disable_current_modes():  # the interpreter's own calls
                return launched(kernel, *args, **how)

        here.setattr(type(_linear_kernel), "run", run)
        with Counted():
            step.run()
    return kernels, calls


@torch.no_grad()
def test_a_step_has_no_launch_more_for_them(
    base: Any, store: CompressedStore, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for paths in (exported, {name: store.path(name) for name in store.names}):
        model = routed(base, paths, "triton")
        found.append(launches(model, monkeypatch))
    (ordinary, calls), (compressed, same) = found
    groups = {id(group) for group in model.adapted.groups.values()}
    assert compressed == ordinary and calls == same
    assert ordinary["_linear_kernel"] > len(groups) / 2


@torch.no_grad()
def test_it_is_no_part_of_the_base_and_is_saved_as_ordinary_adapters(
    base: Any, store: CompressedStore, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = routed(base, {name: store.path(name) for name in store.names})
    assert model.base.state_dict().keys() == base.state_dict().keys()
    model.save_pretrained(tmp_path / "saved")
    again = MoLoRAModel.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base))
    for selection in (*SELECTIONS, {"domain": "auto", "user": "ada"}):
        close(again(ids, selection=selection).logits, model(ids, selection=selection).logits)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(base: Any, store: CompressedStore, ids: torch.Tensor) -> None:
    model = routed(base, {name: store.path(name) for name in store.names})
    wanted = model(ids, selection=SELECTIONS).logits
    other = copy.deepcopy(model)
    other.remove_adapter("domain", "math")
    close(model(ids, selection=SELECTIONS).logits, wanted)
    other.add_adapter("domain", "math", store.path("math"))
    close(other(ids, selection=SELECTIONS).logits, wanted)


@torch.no_grad()
def test_pages_that_torch_reads(
    base: Any, store: CompressedStore, exported: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no kernel can be compiled, say."""
    monkeypatch.setattr("molora.groups.AdapterGroup.serves", lambda *_: False)
    paths = {**exported, "math": store.path("math"), "ada": store.path("ada")}
    model, plain = routed(base, paths, "triton"), routed(base, exported, "torch")
    close(model(ids, selection=SELECTIONS).logits, plain(ids, selection=SELECTIONS).logits)


def test_a_basis_over_the_kernels_largest_rank_is_refused_whole(base: Any) -> None:
    name = "model.layers.1.mlp.down_proj"
    basis, a, b = Basis(torch.randn(32, 300), torch.randn(48, 300)), torch.randn(2, 300), torch.randn(300, 2)
    adapter = Adapter(Path("wide"), {name: SharedWeights(basis, a, b)}, {})
    with pytest.raises(UnsupportedAdapterError, match=rf"rank 300 at the basis of {name}.*backend='torch'"):
        check_fits(adapter, base, "this base", "triton")
    check_fits(adapter, base, "this base", "torch")


@torch.no_grad()
def test_it_follows_the_base_to_another_dtype(base: Any, store: CompressedStore, ids: torch.Tensor) -> None:
    model = routed(base, {name: store.path(name) for name in store.names}, "torch")
    wanted = model(ids, selection=SELECTIONS).logits
    close(model.double()(ids, selection=SELECTIONS).logits.to(wanted.dtype), wanted)
    paths = [path for module in model.modules() if isinstance(module, MoLoRALinear) for path in module.shared]
    assert paths and all(path.U.dtype == path.V.dtype == torch.float64 for path in paths)


@torch.no_grad()
def test_a_stack_file_names_them_by_their_place(
    base: Any, store: CompressedStore, exported: dict[str, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    shutil.copytree(store.folder, tmp_path / "compressed")
    (tmp_path / "stack.yaml").write_text(
        "layers: [{name: domain, default: null, adapters: {math: compressed/cores/math.safetensors}}]"
    )
    model = MoLoRAModel.from_base(copy.deepcopy(base), tmp_path / "stack.yaml")
    close(model(ids, selection={"domain": "math"}).logits, by_peft(base, exported, ids, {"math": 1}))
    (found,) = describe(str(tmp_path / "stack.yaml"))["layers"][0]["adapters"]
    assert found["ranks"] == [4] and found["parameters"] < load_adapter(exported["math"]).parameters


@pytest.mark.parametrize("name", ["nobody", "math"])
def test_a_place_without_an_adapter_is_told(name: str, store: CompressedStore, tmp_path: Path) -> None:
    folder = store.folder if name == "nobody" else tmp_path
    with pytest.raises(AdapterNotFoundError, match="nobody|no compressed store"):
        load_adapter(folder / "cores" / f"{name}.safetensors")


def test_what_all_share_is_there_once(base: Any, store: CompressedStore) -> None:
    model = routed(base, {name: store.path(name) for name in store.names})
    for module in model.modules():
        if isinstance(module, MoLoRALinear):
            assert len(module.shared) <= len(store.manifest.clusters)
    first, second = (load_adapter(store.path(name)) for name in ("math", "math"))
    assert all(first.modules[name].basis is second.modules[name].basis for name in first.modules)  # type: ignore[union-attr]
    assert DEVICE.type in str(next(iter(model.base.parameters())).device)
