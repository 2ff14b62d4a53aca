"""``molora profile`` and ``molora describe`` on a tiny saved MoLoRA, with a network that knows two words."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molora import MoLoRAModel
from molora.cli import app
from molora.errors import DataError, HypernetError, StackError
from molora.personalize import embeddings
from molora.personalize.from_text import factors_from_texts
from molora.personalize.text_net import TextNet, TextNetConfig
from molora.versions import Versions
from tests.unit.spoken import make_spoken, save_spoken


def encode(texts: Any) -> torch.Tensor:
    return torch.tensor([[float("blue" in text), float("red" in text), 1.0] for text in texts])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = make_spoken(tmp_path / "adapters")
    saved = save_spoken(model, tmp_path)
    torch.manual_seed(0)
    net = TextNet(TextNetConfig.for_base(model.base, str(tmp_path / "base"), 3, width=16, rank=2, encoder="words"))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net.save(tmp_path / "net")
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=encode, name=name))
    return saved


def write_history(path: Path, says: str, user: str = "ada") -> Path:
    turns = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": says}]
    path.write_text(json.dumps({"messages": turns, "user": user}) + "\n")
    return path


def run(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    app([*arguments, "--json"], standalone_mode=False)
    return dict(json.loads(capsys.readouterr().out))


def test_a_description_becomes_an_adapter(place: Path, tmp_path: Path, capsys: Any) -> None:
    line = ["--model", str(place), "--hypernet", str(tmp_path / "net")]
    assert run(capsys, "describe", "likes blue", "--as", "user/fan", *line) == {"adapter": "user/fan", "version": 1}
    assert run(capsys, "describe", "likes red", "--as", "user/fan", *line)["version"] == 2
    net = TextNet.load(tmp_path / "net")
    for number, text in ((1, "likes blue"), (2, "likes red")):
        Versions(place, "user", "fan").promote(number)
        adapter = MoLoRAModel.from_pretrained(place).adapters["user/fan"]
        (wanted,) = factors_from_texts(net, encode, [text])
        for name, weights in adapter.modules.items():
            A, B = wanted[name]
            assert weights.scale == 1.0
            assert torch.equal(weights.A, A.bfloat16()) and torch.equal(weights.B, B.bfloat16())
    kept = "".join(file.read_text() for file in (place / "versions").rglob("*.json"))
    assert "likes" not in kept and "a description" in kept


def test_a_history_becomes_an_adapter(place: Path, tmp_path: Path, capsys: Any) -> None:
    line = ["--model", str(place), "--hypernet", str(tmp_path / "net")]
    blue = write_history(tmp_path / "ada.jsonl", "blue, of course")
    assert run(capsys, "profile", "user", "ada", "--history", str(blue), *line)["adapter"] == "user/ada"
    first = MoLoRAModel.from_pretrained(place).adapters["user/ada"]
    red = write_history(tmp_path / "red.jsonl", "red, of course")
    run(capsys, "profile", "user", "ada", "--history", str(red), *line)
    second = MoLoRAModel.from_pretrained(place).adapters["user/ada"]
    assert any(not torch.equal(first.modules[name].B, second.modules[name].B) for name in first.modules)
    assert "of course" not in "".join(file.read_text() for file in (place / "versions").rglob("*.json"))


def test_somebody_without_a_history_and_what_is_refused(place: Path, tmp_path: Path, capsys: Any) -> None:
    line = ["--model", str(place), "--hypernet", str(tmp_path / "net")]
    (tmp_path / "none.jsonl").write_text("")
    capsys.readouterr()
    app(["profile", "user", "new", "--history", str(tmp_path / "none.jsonl"), *line], standalone_mode=False)
    out, err = capsys.readouterr()
    assert "user/new, version 1." in out and "holds nothing of new" in err
    other = write_history(tmp_path / "max.jsonl", "blue", "max")
    with pytest.raises(DataError, match="max"):
        app(["profile", "user", "ada", "--history", str(other), *line], standalone_mode=False)
    with pytest.raises(DataError, match="A text is empty"):
        app(["describe", " ", "--as", "user/x", *line], standalone_mode=False)
    with pytest.raises(StackError, match="has no layer 'nobody'"):
        app(["describe", "blue", "--as", "nobody/x", *line], standalone_mode=False)
    about = json.loads((tmp_path / "net/hypernet.json").read_text())
    (tmp_path / "net/hypernet.json").write_text(json.dumps({**about, "base": "some/other"}))
    with pytest.raises(HypernetError, match="some/other"):
        app(["describe", "blue", "--as", "user/x", *line], standalone_mode=False)
