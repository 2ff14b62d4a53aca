"""The exported folder: its columns, its name, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molora import MoLoRAModel, Stack, StackLayer
from molora.adapter import Adapter
from molora.errors import AdapterFormatError, SelectionError, UnsupportedAdapterError
from molora.vllm.export import content_hash, export, padded
from molora.vllm.folder import MANIFEST, TABLE, read_manifest, reads_hidden
from molora.vllm.selections import Selections
from tests.vllm.conftest import ROUTERS, load_base, write_adapter


def saved(base: Path, stack: Stack, folder: Path, router: Any = None) -> Path:
    MoLoRAModel.from_base(load_base(base), stack, router).save_pretrained(folder)
    return folder


def test_every_adapter_has_its_columns(folders: dict[str, Path], adapters: dict[str, Path]) -> None:
    manifest = read_manifest(folders["averages"])
    assert [(c["adapter"], c["first"], c["count"]) for c in manifest["columns"]] == [
        ("law", 0, 4), ("math", 4, 4), ("code", 8, 3), ("ada", 11, 2), ("bob", 13, 2)]  # fmt: skip
    config = json.loads((folders["averages"] / "adapter_config.json").read_text())
    assert manifest["rank"] == config["r"] == config["lora_alpha"] == 16
    tensors = load_file(folders["averages"] / "adapter_model.safetensors")
    for column in manifest["columns"]:
        modules = Adapter.load(adapters[column["adapter"]]).modules
        here = slice(column["first"], column["first"] + column["count"])
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            A, B = tensors[key][here], tensors[key.replace("lora_A", "lora_B")][:, here]
            own = modules.get(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            wanted = own.scale * (own.B @ own.A) if own is not None else torch.zeros(len(B), A.shape[1])
            torch.testing.assert_close(B @ A, wanted)


def test_the_name_tells_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    assert len({folder.name for folder in folders.values()}) == len(folders)
    source = folders["averages"].parent / "saved" / "averages"
    again = export(source, tmp_path)
    assert again.name == folders["averages"].name and content_hash(again) == again.name.rpartition("-")[2]
    assert export(source, tmp_path, {"domain": ["math"]}).name != again.name  # another selection answers otherwise
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_heads_are_refused(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "head", 1, {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "lm_head"]})
    folder = saved(base, Stack([StackLayer("domain", {"head": tmp_path / "head"})]), tmp_path / "saved")
    with pytest.raises(UnsupportedAdapterError, match="domain/head adapts lm_head"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_read_of_token_ids_is_a_table(folders: dict[str, Path], models: dict[str, MoLoRAModel]) -> None:
    for kind in ("averages", "twice"):
        part: Any = models[kind].router.parts[0]  # type: ignore[union-attr]
        read = part.read(models[kind].base.get_input_embeddings().weight)
        torch.testing.assert_close(load_file(folders[kind] / TABLE)["table"], read)
    assert not (folders["deep"] / TABLE).exists()
    assert [reads_hidden(read_manifest(folders[kind])) for kind in ROUTERS] == [False, False, True, True]


def test_wrong_selections_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["averages"].parent / "saved" / "averages"
    with pytest.raises(SelectionError, match="no adapter 'cooking'"):
        export(source, tmp_path, {"domain": "cooking"})
    with pytest.raises(SelectionError, match="not a list"):
        export(source, tmp_path, [{}, {}])  # type: ignore[arg-type]


def test_keyed_layers_act_by_name(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    layer = StackLayer("task", {name: adapters[name] for name in ("math", "code")}, keyed=True)
    folder = saved(base, Stack([layer]), tmp_path / "saved")
    with pytest.raises(SelectionError, match="nothing tells by the question what acts in layer 'task'"):
        export(folder, tmp_path / "out")
    found = Selections(read_manifest(export(folder, tmp_path / "out", {"task": None})))
    assert found.resolve('{"task": "code"}').forced.tolist() == [[1]]
    with pytest.raises(SelectionError, match="nothing tells by the question"):
        found.resolve('{"task": "auto"}')


def test_ranks_are_those_of_vllm() -> None:
    assert [padded(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(UnsupportedAdapterError, match="513 ranks"):
        padded(513)


def test_damaged_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": 1}')
    with pytest.raises(AdapterFormatError, match="export the stack again"):
        read_manifest(tmp_path)
