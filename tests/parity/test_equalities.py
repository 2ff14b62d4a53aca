"""The equalities of the design, each against something that this project did not write."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.errors import ConfigError, StackError
from molora.router import Router
from tests.conftest import FAMILIES, make_base, write_adapter


def make_stack(adapters: dict[str, Path], **layer: Any) -> Stack:
    return Stack(
        [
            StackLayer("personality", {"sage": adapters["sage"]}, default=None),
            StackLayer("domain", {"math": adapters["math"], "code": adapters["code"]}, **layer),
            StackLayer("user", {"ada": adapters["ada"]}, shared=True),
        ]
    )


def make_routed(base: Any, adapters: dict[str, Path], seed: int = 3, top_k: int = 1, **config: Any) -> MoLoRAModel:
    """A routed model whose router is random enough that its choices change from token to token."""
    torch.manual_seed(seed)
    settings = RouterConfig(**{"width": 8, "hidden": 16, **({} if "decays" in config else {"units": 12}), **config})
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters, top_k=top_k), settings)
    assert isinstance(model.router, Router)
    for part in model.router.parts:
        part.std.fill_(0.05)
        torch.nn.init.normal_(part.output.weight, std=2.0)
    return model.eval()


ROUTED: dict[str, dict[str, Any]] = {
    "embedding": {"reads": 0},
    "no-memory": {"reads": 0, "decays": ()},
    "averages": {"reads": 0, "decays": (0.8, 0.95)},
    "layer-1": {"reads": 1},
    "two-routers": {"reads": (0, 2)},
    "softmax-top2": {"reads": 0, "weights": "softmax", "top_k": 2},
}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_forced_adapter_is_peft(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    base = make_base(family)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    path = write_adapter(base, tmp_path / "a", 1, **fan)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), path).eval()(ids).logits
    assert (expected - base(ids).logits).abs().max() > 1e-2
    model = MoLoRAModel.from_base(base, Stack([StackLayer("domain", {"math": path})]))
    close(model(ids, selection={"domain": "math"}).logits, expected)


@pytest.mark.parametrize("name", ["math", "code", "sage", "ada"])
@torch.no_grad()
def test_every_config_is_peft(name: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    expected = PeftModel.from_pretrained(copy.deepcopy(base), adapters[name]).eval()(ids).logits
    model = MoLoRAModel.from_base(copy.deepcopy(base), Stack([StackLayer("any", {name: adapters[name]})]))
    close(model(ids, selection={"any": name}).logits, expected)


@torch.no_grad()
def test_an_adapted_head_is_peft(base: Any, tmp_path: Path, ids: torch.Tensor) -> None:
    path = write_adapter(make_base("qwen3"), tmp_path / "a", 1, target_modules=["lm_head", "q_proj"])
    expected = PeftModel.from_pretrained(make_base("qwen3"), path).eval()(ids).logits
    model = MoLoRAModel.from_base(make_base("qwen3"), Stack([StackLayer("any", {"a": path})]))
    close(model(ids, selection={"any": "a"}).logits, expected)
    close(model(ids, selection={"any": "a"}, logits_to_keep=2).logits, expected[:, -2:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_null_everywhere_is_the_base(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    base = make_base(family)
    expected = copy.deepcopy(base)(ids).logits
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    path = write_adapter(base, tmp_path / "a", 1, **fan)
    model = MoLoRAModel.from_base(base, Stack([StackLayer("domain", {"math": path})]), RouterConfig(width=8, hidden=8))
    assert torch.equal(model(ids, selection={"domain": None}).logits, expected)
    assert torch.equal(model.base(ids).logits, expected)


@torch.no_grad()
def test_two_forced_layers_are_peft_with_both(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    peft = PeftModel.from_pretrained(copy.deepcopy(base), adapters["sage"], adapter_name="sage")
    peft.load_adapter(adapters["code"], adapter_name="code")
    peft.base_model.set_adapter(["sage", "code"])
    expected = peft.eval()(ids).logits
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters))
    close(model(ids, selection={"personality": "sage", "domain": "code", "user": None}).logits, expected)


MIXTURES: list[dict[str, float]] = [{"math": 0.7, "code": 0.5}, {"code": -1.5}, {"code": 1.0, "math": 2.0}]


@torch.no_grad()
def test_adapters_at_weights_are_peft_with_all(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    """Each sequence of a batch has its own weights."""
    expected = []
    for row, mixture in zip(ids, MIXTURES, strict=True):
        peft = PeftModel.from_pretrained(copy.deepcopy(base), adapters["math"], adapter_name="math")
        peft.load_adapter(adapters["code"], adapter_name="code")
        peft.base_model.set_adapter(list(mixture))
        for module in peft.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                for name in mixture.keys() & module.scaling.keys():
                    module.scaling[name] *= mixture[name]
        # In float64: in float32, PEFT itself is off by more than the tolerance on some CPUs.
        expected.append(peft.eval().double()(row[None]).logits)
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters))
    off = {"personality": None, "user": None}
    found = model(ids, selection=[{**off, "domain": mixture} for mixture in MIXTURES], output_routes=True)
    close(found.logits, torch.cat(expected))
    for row, mixture, wanted in zip(ids, MIXTURES, expected, strict=True):
        close(model(row[None], selection={**off, "domain": mixture}).logits, wanted)
    for number, mixture in enumerate(MIXTURES):
        acting = {name: share for _, name, share in found.routes.at(number, 3) if name is not None}
        assert acting == pytest.approx(mixture)


@torch.no_grad()
def test_merged_on_the_live_stack_is_stacked_at_weights(
    base: Any, adapters: dict[str, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters))
    off = {"personality": None, "user": None}
    stacked = model(ids, selection={**off, "domain": {"math": 0.7, "code": -0.5}}).logits
    report = model.merge("domain", ["math", "code"], "both", tmp_path / "both", weights=[0.7, -0.5])
    assert report.error < 1e-6 and list(model.stack["domain"].adapters) == ["math", "code", "both"]
    close(model(ids, selection={**off, "domain": "both"}).logits, stacked)
    close(model(ids, selection={**off, "domain": {"math": 0.7, "code": -0.5}}).logits, stacked)
    for names, into in ((["math", "law"], "more"), (["math", "code"], "both"), (["math"], "more")):
        with pytest.raises((StackError, ConfigError)):
            model.merge("domain", names, into, tmp_path / "more")
    assert not (tmp_path / "more").exists() and list(model.stack["domain"].adapters) == ["math", "code", "both"]


@torch.no_grad()
def test_merged_by_cat_is_stacked(base: Any, adapters: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    peft = PeftModel.from_pretrained(copy.deepcopy(base), adapters["math"], adapter_name="math")
    peft.load_adapter(adapters["code"], adapter_name="code")
    peft.add_weighted_adapter(["math", "code"], [1.0, 1.0], "both", combination_type="cat")
    peft.save_pretrained(tmp_path, selected_adapters=["both"])
    model = MoLoRAModel.from_base(
        copy.deepcopy(base),
        Stack([StackLayer("a", {"math": adapters["math"]}), StackLayer("b", {"code": adapters["code"]}),
               StackLayer("c", {"both": tmp_path / "both"})]),
    )  # fmt: skip
    stacked = model(ids, selection={"a": "math", "b": "code", "c": None}).logits
    close(model(ids, selection={"a": None, "b": None, "c": "both"}).logits, stacked)


@torch.no_grad()
def test_a_routed_forward_is_a_loop_over_peft_adapters(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    """Per-token routes, replayed by PEFT: its LoRA outputs masked token by token."""
    model = make_routed(base, adapters, seed=98)
    out = model(ids, selection={"domain": "auto"}, output_routes=True)
    slots = out.routes.slots[..., 1]
    names = out.routes.names
    none, math, code = (slots == slot for slot in (-1, names.index("domain/math"), names.index("domain/code")))
    assert min(none.sum(), math.sum(), code.sum()) >= slots.numel() // 5
    peft = PeftModel.from_pretrained(copy.deepcopy(base), adapters["math"], adapter_name="math")
    peft.load_adapter(adapters["code"], adapter_name="code")
    peft.base_model.set_adapter(["math", "code"])
    for module in peft.modules():
        if hasattr(module, "lora_B") and hasattr(module.lora_B, "keys"):
            for name in ("math", "code"):
                mask = (slots == names.index(f"domain/{name}")).unsqueeze(-1)
                module.lora_B[name].register_forward_hook(lambda _, __, y, mask=mask: y * mask)
    close(out.logits, peft.eval()(ids).logits)


@pytest.mark.parametrize("kind", ROUTED)
@torch.no_grad()
def test_cached_generation_is_full_recomputation(
    kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    selection = {"personality": "sage", "domain": "auto", "user": ["ada"]}
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=ids, selection=selection, **options)
    full = model.generate(input_ids=ids, selection=selection, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    close(torch.stack(cached.logits), torch.stack(full.logits))
    routes = model(cached.sequences, selection=selection, output_routes=True).routes
    assert len(routes.slots[..., 1].unique()) >= 2


@pytest.mark.parametrize("kind", ROUTED)
@torch.no_grad()
def test_pieces_are_the_whole(kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    whole = model(ids).logits
    cache = None
    for piece in ids.split([1, 6, 3, 7], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    close(out.logits, whole[:, -7:])


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_padded_batch_of_different_selections_is_each_alone(
    kind: str, static: bool, base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    # In float32 it is rounding alone that is compared, which on some CPUs comes to 1e-5 after twelve steps.
    model = make_routed(base, adapters, **ROUTED[kind]).double()
    selections = [
        {"personality": "sage", "domain": "auto", "user": None},
        {"personality": None, "domain": "code", "user": "ada"},
        {"personality": None, "domain": ["math"], "user": None},
    ]
    lengths = [17, 5, 11]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if static:
        options.update(cache_implementation="static", disable_compile=True)
    batch = model.generate(input_ids=ids * mask, attention_mask=mask, selection=selections, **options)
    for row, (length, selection) in enumerate(zip(lengths, selections, strict=True)):
        alone = model.generate(input_ids=ids[row : row + 1, -length:], selection=selection, **options)
        n = alone.sequences.shape[1] - length
        assert torch.equal(batch.sequences[row, 17 : 17 + n], alone.sequences[0, length:])
        close(torch.stack(batch.logits)[:n, row], torch.stack(alone.logits)[:, 0], 1e-6)


@torch.no_grad()
def test_saved_is_loaded(base: Any, adapters: dict[str, Path], ids: torch.Tensor, tmp_path: Path) -> None:
    model = make_routed(base, adapters, reads=(0, 1))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = MoLoRAModel.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base))
    assert torch.equal(again(ids).logits, expected)
    again.save_pretrained(tmp_path / "saved")  # over itself, which its adapters come from
    assert torch.equal(MoLoRAModel.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base))(ids).logits, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
