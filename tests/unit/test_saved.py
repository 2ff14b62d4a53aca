"""Saved folders that are damaged, foreign or half written."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora import MoLoRAModel, Router, RouterConfig, VocabularyRouter, saved
from molora.errors import AdapterError, ConfigError, MoLoRAError, RouterError, StackError
from molora.selection import router_rows
from tests.parity.test_equalities import make_routed


@pytest.fixture(scope="module")
def good(base: Any, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "good"
    make_routed(base, adapters, reads=(0, 1)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def manifest(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / saved.MANIFEST).read_text())
        edit(data)
        (folder / saved.MANIFEST).write_text(json.dumps(data))

    return change


def router(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / saved.ROUTER)
        edit(weights)
        save_file(weights, folder / saved.ROUTER)

    return change


def text(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(folder: Path) -> None:
    data = (folder / saved.ROUTER).read_bytes()
    (folder / saved.ROUTER).write_bytes(data[: len(data) // 2])


CHANGES: dict[str, tuple[type[MoLoRAError], str, Callable[[Path], Any]]] = {
    "no manifest": (StackError, "not a saved MoLoRA", lambda folder: (folder / saved.MANIFEST).unlink()),
    "not JSON": (StackError, "not readable", text(saved.MANIFEST, b"{")),
    "binary": (StackError, "not readable", text(saved.MANIFEST, b"\xff\xfe\x00")),
    "a list": (StackError, "must have the keys", text(saved.MANIFEST, b"[]")),
    "unknown key": (StackError, "must have the keys base, format", manifest(lambda m: m.update(extra=1))),
    "missing key": (StackError, "must have the keys", manifest(lambda m: m.pop("router"))),
    "later format": (StackError, "has format 2; this version reads 1", manifest(lambda m: m.update(format=2))),
    "unknown layer key": (StackError, "A layer has the keys", manifest(lambda m: m["stack"]["layers"][0].update(k=1))),
    "base of no kind": (StackError, "base", manifest(lambda m: m.update(base="name"))),
    "base without name": (StackError, "base", manifest(lambda m: m.update(base={}))),
    "router of no kind": (RouterError, "router", manifest(lambda m: m.update(router=[1]))),
    "router of an unknown kind": (RouterError, "oracle", manifest(lambda m: m["router"].update(kind="oracle"))),
    "router without config": (RouterError, "config", manifest(lambda m: m["router"].pop("config"))),
    "router without rows": (RouterError, "rows", manifest(lambda m: m["router"].pop("rows"))),
    "unknown setting": (ConfigError, "height", manifest(lambda m: m["router"]["config"].update(height=2))),
    "setting of no kind": (ConfigError, "width", manifest(lambda m: m["router"]["config"].update(width="x"))),
    "other width": (RouterError, "does not fit", manifest(lambda m: m["router"]["config"].update(width=9))),
    "other candidates": (
        RouterError,
        "saved for",
        manifest(lambda m: m["router"]["rows"].__setitem__(0, "domain/law")),
    ),
    "no router file": (RouterError, "missing or damaged", lambda folder: (folder / saved.ROUTER).unlink()),
    "router cut": (RouterError, "missing or damaged", cut),
    "router a pickle": (RouterError, "missing or damaged", text(saved.ROUTER, b"\x80\x04K\x01.")),
    "router NaN": (RouterError, "NaN", router(lambda w: w["parts.0.mean"][0].fill_(float("nan")))),
    "router samples": (
        RouterError,
        "does not fit",
        router(
            lambda w: w.update({"parts.0.samples.features": torch.ones(2, 3), "parts.0.samples.rows": torch.ones(2)})
        ),
    ),
    "router samples of no row": (
        RouterError,
        "rows that it does not have",
        router(
            lambda w: w.update(
                {
                    "parts.0.samples.features": torch.ones(1, w["parts.0.output.weight"].shape[1]),
                    "parts.0.samples.rows": torch.full((1,), 99),
                }
            )
        ),
    ),
    "router lacks a tensor": (RouterError, "does not fit", router(lambda w: w.pop(sorted(w)[0]))),
    "router has one more": (RouterError, "does not fit", router(lambda w: w.update(extra=torch.ones(1)))),
    "an adapter is gone": (AdapterError, "", lambda folder: shutil.rmtree(folder / "adapters" / "domain" / "math")),
    "an adapter is cut": (
        AdapterError,
        "damaged",
        text("adapters/domain/math/adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged(name: str, folder: Path, base: Any) -> None:
    error, sentence, change = CHANGES[name]
    change(folder)
    with pytest.raises(error, match=sentence):
        MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))


def test_a_stack_with_other_adapters(folder: Path, base: Any) -> None:
    shutil.copytree(folder / "adapters" / "domain" / "math", folder / "adapters" / "domain" / "law")
    manifest(lambda m: m["stack"]["layers"][1]["adapters"].update(law="adapters/domain/law"))(folder)
    with pytest.raises(RouterError, match="domain/law"):
        MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))


@pytest.mark.parametrize("place", ["/nowhere/at/all", "../x", "a b", ""])
def test_no_folder(place: str) -> None:
    with pytest.raises(StackError):
        MoLoRAModel.from_pretrained(place)


def test_what_is_written(good: Path, adapters: dict[str, Path]) -> None:
    files = sorted(path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file())
    assert {"molora.json", "router.safetensors", "adapters/domain/math/adapter_config.json"} <= set(files)
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
    for layer, name in (("domain", "math"), ("user", "ada")):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            written = good / "adapters" / layer / name / file
            assert written.read_bytes() == (adapters[name] / file).read_bytes()
    data = json.loads((good / "molora.json").read_text())
    assert data["format"] == 1 and str(good) not in json.dumps(data["stack"])


@torch.no_grad()
def test_a_moved_folder_still_loads(good: Path, base: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    expected = MoLoRAModel.from_pretrained(good, base=copy.deepcopy(base))(ids).logits
    moved = shutil.copytree(good, tmp_path / "elsewhere")
    assert torch.equal(MoLoRAModel.from_pretrained(moved, base=copy.deepcopy(base))(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "softmax", "reads 2", "changed"])
def test_every_kind_is_saved_and_loaded(
    kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor, tmp_path: Path
) -> None:
    settings = {"softmax": {"weights": "softmax", "top_k": 2}, "reads 2": {"reads": 2}}
    model = make_routed(base, adapters, **settings.get(kind, {}))
    if kind == "none":
        model.set_router(None)
    if kind == "changed":  # a slot that is free, and rows out of the stack's order
        model.remove_adapter("domain", "math")
        model.add_adapter("personality", "wit", adapters["code"])
        model.add_adapter("domain", "law", adapters["math"])
    model.save_pretrained(tmp_path / "saved")
    again = MoLoRAModel.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base))
    assert again.stack.names == model.stack.names
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again(ids, selection={"user": "ada"}).logits, model(ids, selection={"user": "ada"}).logits)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_foreign_is_overwritten(kind: str, base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = make_routed(base, adapters)
    target = tmp_path / "mine"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(StackError, match="nothing was written"):
        model.save_pretrained(target)
    kept = target / "thesis.txt" if kind == "folder" else target
    assert kept.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(folder: Path) -> None:
    """What lies in a saved folder and is not its own."""
    (folder / "hypernets" / "profile").mkdir(parents=True)
    (folder / "hypernets" / "profile" / "hypernet.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("mine")
    (folder / "latest").symlink_to("README.md")
    (folder / saved.ROUTER_METRICS).write_text("{}")


def test_what_lies_beside_a_saved_model_stays(folder: Path, base: Any) -> None:
    model = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    fresh = folder.with_name("fresh")
    model.remove_adapter("domain", "math")
    model.save_pretrained(fresh)
    beside(folder)
    model.save_pretrained(folder)
    others = {"hypernets/profile/hypernet.safetensors": b"weights", "README.md": b"mine", "latest": b"mine"}
    # Of the model itself there is what a new folder has: no adapter that was removed, nor how an older router was made.
    assert contents(folder) == contents(fresh) | others
    assert (folder / "latest").is_symlink()


@pytest.mark.parametrize("place", ["copy", "others", "router", "swap"])
def test_a_crash_leaves_the_old_one(
    place: str, folder: Path, base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    beside(folder)
    before, calls = contents(folder), []

    def fail(*args: Any, **_: Any) -> None:
        calls.append(args)
        raise OSError("no space left")

    def fail_second(source: Any, target: Any, rename: Any = os.rename) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        rename(source, target)

    if place == "copy":
        monkeypatch.setattr(saved.shutil, "copyfile", fail)
    elif place == "others":
        monkeypatch.setattr(saved.shutil, "copytree", fail)
    elif place == "router":
        monkeypatch.setattr(saved, "save_file", fail)
    else:
        monkeypatch.setattr(saved.os, "replace", fail_second)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert calls
    assert folder.is_dir() and contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "entry",
    [
        {"rules": None},
        {"rules": [3]},
        {"rules": {"domain/math": 3}},
        {"rules": {"domain/law": [3]}},
        {"rules": {"domain/math": [99]}},
        {"vocabulary": "many"},
        {"vocabulary": 50},
    ],
    ids=str,
)
def test_bad_vocabulary_rules(entry: dict[str, Any], folder: Path, base: Any) -> None:
    model = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    model.set_router(VocabularyRouter({"domain/math": [3]}, router_rows(model.stack), 97))
    model.save_pretrained(folder)
    manifest(lambda m: m["router"].update(entry))(folder)
    with pytest.raises(RouterError):
        MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))


def test_a_router_of_another_size(base: Any, adapters: dict[str, Path]) -> None:
    model = make_routed(base, adapters)
    before = model.router

    with pytest.raises(RouterError, match="64 features"):
        model.set_router(Router(RouterConfig(width=8, hidden=8), router_rows(model.stack), 64))
    assert model.router is before
