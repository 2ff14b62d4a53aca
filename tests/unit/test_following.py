"""A loaded model follows its saved folder: what it then says is what a model says that is loaded anew."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from molora import MoLoRAModel, Router
from molora.cli import app
from molora.errors import AdapterError
from molora.following import Following
from molora.saved import MANIFEST, load
from molora.settled import settle
from molora.versions import Versions
from tests.conftest import write_adapter
from tests.unit.spoken import make_spoken, save_spoken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_spoken(make_spoken(tmp_path / "adapters"), tmp_path)


@torch.no_grad()
def said(model: MoLoRAModel) -> torch.Tensor:
    return model(torch.arange(5, 45)[None]).logits


def loaded(folder: Path) -> MoLoRAModel:
    return MoLoRAModel.from_pretrained(folder, dtype=torch.float32)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder.parent / "base")


def promote(folder: Path, source: Any, *of: str) -> int:
    mine = Versions(folder, *of)
    number = mine.add(source).number
    mine.promote(number)
    return number


def test_what_is_promoted_serves_from_the_next_turn_on(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    following = Following(model, folder)
    before = said(model)
    assert following.catch_up() == []
    promote(folder, write_adapter(plain(folder), tmp_path / "newer", 9), "domain", "math")
    assert torch.equal(said(model), before)  # not before it is asked
    assert following.catch_up() == ["domain/math"] and following.catch_up() == []
    assert not torch.equal(said(model), before) and torch.equal(said(model), said(loaded(folder)))
    Versions(folder, "domain", "math").rollback()
    assert following.catch_up() == ["domain/math"]
    assert torch.equal(said(model), before)


def test_a_generation_under_way_is_not_disturbed(folder: Path, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hello"}]
    expected = [token.text for token in loaded(folder).stream(prompt, max_new_tokens=12)]
    model = loaded(folder)
    following = Following(model, folder)
    stream = model.stream(prompt, max_new_tokens=12)
    found = [next(stream).text]
    promote(folder, write_adapter(plain(folder), tmp_path / "newer", 9), "domain", "math")
    found += [token.text for token in stream]
    assert found == expected
    assert following.catch_up() == ["domain/math"]


def test_a_router_and_an_adapter_that_comes_and_goes(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    following = Following(model, folder)
    router = load(folder).router
    assert isinstance(router, Router)
    with torch.no_grad():
        router.parts[0].output.bias += torch.arange(len(router.rows)) * 10.0
    promote(folder, router)
    promote(folder, write_adapter(plain(folder), tmp_path / "ada", 7), "user", "ada")
    assert following.catch_up() == ["user/ada", "router"]
    assert torch.equal(said(model), said(loaded(folder))) and "user/ada" in model.stack.names
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["stack"]["layers"][1]["adapters"]["ada"]
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n")
    assert following.catch_up() == ["user/ada"] and "user/ada" not in model.stack.names


def test_what_is_damaged_is_told_once_and_the_old_one_serves(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    following, before = Following(model, folder), said(model)
    number = promote(folder, write_adapter(plain(folder), tmp_path / "newer", 9), "domain", "math")
    (Versions(folder, "domain", "math").path(number) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError):
        following.catch_up()
    assert following.catch_up() == [] and torch.equal(said(model), before)


def test_a_place_that_is_no_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    assert Following(loaded(folder), "someone/molora").catch_up() == []


def test_a_chat_sees_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = write_adapter(plain(folder), tmp_path / "newer", 9)
    lines = iter(["hello", "again", "/quit"])

    def ask(_: str) -> str:
        line = next(lines)
        if line == "again":
            promote(folder, newer, "domain", "math")
        return line

    monkeypatch.setattr("builtins.input", ask)
    found = CliRunner().invoke(app, ["chat", str(folder), "--max-new-tokens", "3", "--dtype", "float32"])
    assert found.exit_code == 0, found.output
    first, second = found.output.split("New: domain/math")
    assert "tokens" in first and "tokens" in second


def test_what_has_settled_is_not_looked_at_again_and_what_comes_later_is() -> None:
    class Loop:
        def __init__(self) -> None:
            self.itself = self

    settle()
    assert gc.get_freeze_count() > 1000
    gone = weakref.ref(Loop())
    gc.collect()
    assert gone() is None


def test_a_chat_settles_once_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[bool] = []
    monkeypatch.setattr("molora.settled.settle", lambda: settled.append(True))
    found = CliRunner().invoke(app, ["chat", str(folder), "--max-new-tokens", "2"], input="12\n/quit\n")
    assert found.exit_code == 0, found.output
    assert settled == [True]
