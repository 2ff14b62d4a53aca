"""Adapters that cannot be used: one typed error each, and nothing has changed."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from molora import Adapter, MoLoRALinear, MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.adapter import CONFIG_FILE, WEIGHTS_FILE
from molora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    NonFiniteError,
    RouterError,
    StackError,
    UnsupportedAdapterError,
)
from tests.conftest import SMALL, make_base, write_adapter
from tests.parity.test_equalities import make_routed

Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor], str], Any]) -> Change:
    """Edits the tensors; ``edit`` gets them and the name of one lora_B."""

    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS_FILE)
        edit(found, next(key for key in found if "lora_B" in key))
        save_file(found, folder / WEIGHTS_FILE)

    return change


def content(name: str, edit: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes())) and None


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def lie(data: bytes) -> bytes:
    return (2**62).to_bytes(8, "little") + data[8:]


def overlap(data: bytes) -> bytes:
    """A header whose first tensor lies outside the file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [10**9, 10**9 + 64]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


CHANGES: dict[str, tuple[type[AdapterError], str, Change]] = {
    "dora": (UnsupportedAdapterError, "use_dora", config(use_dora=True)),
    "modules to save": (UnsupportedAdapterError, "modules_to_save", config(modules_to_save=["lm_head"])),
    "bias": (UnsupportedAdapterError, "bias=all", config(bias="all")),
    "lora bias": (UnsupportedAdapterError, "lora_bias", config(lora_bias=True)),
    "parameters": (UnsupportedAdapterError, "target_parameters", config(target_parameters=["a.weight"])),
    "token rows": (UnsupportedAdapterError, "trainable_token_indices", config(trainable_token_indices=[1])),
    "replication": (UnsupportedAdapterError, "layer_replication", config(layer_replication=[[0, 2]])),
    "unknown field": (UnsupportedAdapterError, "shiny_new_part", config(shiny_new_part={"on": True})),
    "IA3": (UnsupportedAdapterError, "IA3", config(peft_type="IA3")),
    "no type": (UnsupportedAdapterError, "peft_type", config(peft_type=None)),
    "pissa": (UnsupportedAdapterError, "pissa", config(init_lora_weights="pissa_niter_4")),
    "olora": (UnsupportedAdapterError, "olora", config(init_lora_weights="olora")),
    "bias tensor": (
        UnsupportedAdapterError,
        "lora_B.bias",
        tensors(lambda t, b: t.update({b.replace("weight", "bias"): torch.ones(3)})),
    ),
    "magnitude": (
        UnsupportedAdapterError,
        "magnitude",
        tensors(lambda t, b: t.update({b.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(3)})),
    ),
    "own head": (
        UnsupportedAdapterError,
        "its own lm_head",
        tensors(lambda t, _: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)})),
    ),
    "rank contradicts": (AdapterFormatError, "its config says 9", config(r=9, rank_pattern={})),
    "rank of no kind": (AdapterFormatError, "rank", config(r="four", rank_pattern={})),
    "rank 0": (AdapterFormatError, "rank", config(r=0, rank_pattern={})),
    "rank pattern of no kind": (AdapterFormatError, "rank_pattern", config(rank_pattern=["q_proj"])),
    "broken pattern": (AdapterFormatError, "rank_pattern", config(rank_pattern={"(": 4})),
    "alpha NaN": (NonFiniteError, "alpha", config(lora_alpha=float("nan"), alpha_pattern={})),
    "alpha infinite": (NonFiniteError, "alpha", config(lora_alpha=float("inf"), alpha_pattern={})),
    "no alpha": (AdapterFormatError, "alpha", config(lora_alpha=None, alpha_pattern={})),
    "config not JSON": (AdapterFormatError, "not readable JSON", content(CONFIG_FILE, lambda _: b"{r: 4")),
    "config a list": (UnsupportedAdapterError, "peft_type", content(CONFIG_FILE, lambda _: b"[]")),
    "config binary": (AdapterFormatError, "not readable JSON", content(CONFIG_FILE, lambda _: b"\xff\xfe\x00")),
    "truncated": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, lambda data: data[: len(data) // 2])),
    "cut in the header": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, lambda data: data[:20])),
    "empty file": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, lambda _: b"")),
    "header lies": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, lie)),
    "offsets lie": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, overlap)),
    "a pickle renamed": (AdapterFormatError, "damaged", content(WEIGHTS_FILE, lambda _: b"\x80\x04K\x01.")),
    "a pickle": (AdapterFormatError, "pickle, which is never read", only_a_pickle),
    "no tensors": (AdapterFormatError, "no tensors", tensors(lambda t, _: t.clear())),
    "NaN": (NonFiniteError, "NaN", tensors(lambda t, b: t[b].view(-1)[0].fill_(float("nan")))),
    "infinite": (NonFiniteError, "infinite", tensors(lambda t, b: t[b].view(-1)[0].fill_(float("-inf")))),
    "no lora_B": (AdapterFormatError, "no lora_B", tensors(lambda t, b: t.pop(b))),
    "whole numbers": (AdapterFormatError, "dtype", tensors(lambda t, b: t.update({b: t[b].to(torch.int32)}))),
    "one dimension": (UnsupportedAdapterError, "lora_B", tensors(lambda t, b: t.update({b: t[b].flatten()}))),
    "other modules": (
        AdapterMismatchError,
        "no such linear module",
        tensors(lambda t, b: t.update({k.replace("self_attn", "attention"): t.pop(k) for k in list(t)})),
    ),
    "other sizes": (
        AdapterMismatchError,
        "trained for another base",
        tensors(lambda t, b: t.update({b: torch.ones(t[b].shape[0] + 1, t[b].shape[1])})),
    ),
    "no config": (AdapterNotFoundError, "no adapter_config.json", lambda folder: (folder / CONFIG_FILE).unlink()),
    "no weights": (AdapterFormatError, "holds no", lambda folder: (folder / WEIGHTS_FILE).unlink()),
    "no folder": (AdapterNotFoundError, "no adapter folder", shutil.rmtree),
    "a file": (
        AdapterNotFoundError,
        "no adapter folder",
        lambda folder: shutil.rmtree(folder) or (folder.write_text("x") and None),  # type: ignore[func-returns-value]
    ),
}


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return make_routed(base, adapters)


def snapshot(model: MoLoRAModel) -> Any:
    ids = torch.arange(3, 40).view(1, -1)
    rows = list(model.router.rows) if model.router is not None else None
    types = [type(module).__name__ for module in model.base.modules()]
    return model(ids).logits, model.stack.to_dict(), model.slots.names, sorted(model.adapters), rows, types


@torch.no_grad()
def refused(model: MoLoRAModel, error: type[Exception], sentence: str, act: Callable[[], Any]) -> None:
    """``act`` raises, and the model is what it was."""
    before = snapshot(model)
    with pytest.raises(error, match=sentence):
        act()
    after = snapshot(model)
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize("name", CHANGES)
def test_a_live_model_refuses_it(name: str, model: MoLoRAModel, adapters: dict[str, Path], tmp_path: Path) -> None:
    error, sentence, change = CHANGES[name]
    folder = shutil.copytree(adapters["code"], tmp_path / "bad")
    change(folder)
    refused(model, error, sentence, lambda: model.add_adapter("domain", "law", folder))
    refused(model, error, sentence, lambda: model.replace_adapter("domain", "math", folder))


@pytest.mark.parametrize("name", ["dora", "NaN", "other sizes", "own head", "truncated"])
@torch.no_grad()
def test_the_base_is_left_alone(name: str, base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    error, sentence, change = CHANGES[name]
    folder = shutil.copytree(adapters["code"], tmp_path / "bad")
    change(folder)
    with untouched(base) as own, pytest.raises(error, match=sentence):
        MoLoRAModel.from_base(own, Stack([StackLayer("a", {"good": adapters["math"], "bad": folder})]))


@pytest.mark.parametrize(
    "router", [RouterConfig(reads=7), RouterConfig(reads=(0, 3))], ids=["layer 7 of 3", "layer 3 of 3"]
)
@torch.no_grad()
def test_the_base_is_left_alone_by_a_bad_router(router: Any, base: Any, adapters: dict[str, Path]) -> None:
    with untouched(base) as own, pytest.raises(RouterError, match="the base has 3 layers"):
        MoLoRAModel.from_base(own, Stack([StackLayer("a", {"good": adapters["math"]})]), router)


class untouched:
    """Gives a copy of a trainable base, and checks that it leaves as it came."""

    def __init__(self, base: Any) -> None:
        self.base = copy.deepcopy(base).train().requires_grad_(True)

    def state(self) -> Any:
        modules = list(self.base.modules())
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)
        return [type(m) for m in modules], hooks, self.base.training, {p.requires_grad for p in self.base.parameters()}

    def __enter__(self) -> Any:
        self.before = self.state(), self.base(torch.arange(3, 20).view(1, -1)).logits
        return self.base

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            assert self.state() == self.before[0]
            assert torch.equal(self.base(torch.arange(3, 20).view(1, -1)).logits, self.before[1])
            assert not any(isinstance(m, MoLoRALinear) for m in self.base.modules())


def test_an_adapter_of_another_base(model: MoLoRAModel, tmp_path: Path) -> None:
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 64}))
    deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 5}))
    others = {
        "wide": (write_adapter(wide, tmp_path / "wide", 1), "32"),
        "deep": (write_adapter(deep, tmp_path / "deep", 1), "no such linear module"),
        "gpt2": (write_adapter(make_base("gpt2"), tmp_path / "gpt2", 1, fan_in_fan_out=True), "no such linear"),
    }
    for path, sentence in others.values():
        refused(model, AdapterMismatchError, sentence, lambda path=path: model.add_adapter("domain", "law", path))


def test_an_embedding_is_no_linear_module(model: MoLoRAModel, base: Any, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "a", 1, target_modules=["embed_tokens"])
    refused(model, UnsupportedAdapterError, "embedding", lambda: model.add_adapter("domain", "law", path))


@pytest.mark.parametrize("path", ["../nowhere/at/all", "a/../b", "..", "", "/nowhere", "x" * 300, "a\0b"], ids=repr)
def test_paths_to_nowhere(path: str, model: MoLoRAModel) -> None:
    refused(model, AdapterNotFoundError, "", lambda: model.add_adapter("domain", "law", path))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "auto", "none", "a" * 65, ".hidden", "math"])
def test_names_that_cannot_be(name: str, model: MoLoRAModel, adapters: dict[str, Path]) -> None:
    refused(model, StackError, "", lambda: model.add_adapter("domain", name, adapters["code"]))


def test_layers_and_adapters_that_are_not_there(model: MoLoRAModel, adapters: dict[str, Path]) -> None:
    for act in (
        lambda: model.add_adapter("tone", "law", adapters["code"]),
        lambda: model.remove_adapter("tone", "law"),
        lambda: model.replace_adapter("tone", "law", adapters["code"]),
    ):
        refused(model, StackError, "no layer 'tone'; the stack has personality, domain, user", act)
    for act in (
        lambda: model.remove_adapter("domain", "law"),
        lambda: model.replace_adapter("domain", "law", adapters["code"]),
    ):
        refused(model, StackError, "no adapter 'law'; it has math, code", act)


def test_a_config_may_say_more_than_is_needed(adapters: dict[str, Path], tmp_path: Path) -> None:
    """A field of a later PEFT that is off changes nothing."""
    folder = shutil.copytree(adapters["code"], tmp_path / "good")
    config(a_new_part=None, another=False, use_dora=False, layer_replication=None)(folder)
    assert Adapter.load(folder).ranks == Adapter.load(adapters["code"]).ranks == [8]
