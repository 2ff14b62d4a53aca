"""Networks beside the starter stack: found for the base that they are for, and the one for documents does its work."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from molora import MoLoRAModel
from molora.base import same_base
from molora.cli import app
from molora.commands.info import describe
from molora.errors import HypernetError, StackError
from molora.personalize import embeddings
from molora.personalize.shipped import FOLDER, TRAINED_BY, all_shipped, shipped
from molora.personalize.text_net import TextNet, TextNetConfig
from molora.starter import VARIABLE, starter_folder
from molora_training.hypernet.lessons import Needles
from tests.unit.spoken import make_spoken, save_spoken
from tests.unit.test_internalize import DOCUMENT, asked, make_net
from tests.unit.test_profile_command import encode, write_history


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A starter of a tiny base, with a network for documents and one for profiles, none for descriptions."""
    torch.manual_seed(0)
    model = make_spoken(tmp_path / "adapters")
    saved = save_spoken(model, tmp_path)
    name = str(model.base_name)
    net = make_net(model.base)
    net.config = replace(net.config, base=name)
    net.save(saved / FOLDER / "document")
    profiles = TextNet(TextNetConfig.for_base(model.base, name, 3, width=16, rank=2, encoder="words"))
    profiles.save(saved / FOLDER / "profile")
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=encode, name=name))
    monkeypatch.setenv(VARIABLE, str(saved))
    return saved


def run(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    app([*arguments, "--json"], standalone_mode=False)
    return dict(json.loads(capsys.readouterr().out))


@torch.no_grad()
def test_without_a_network_named_it_is_the_shipped_one(starter: Path) -> None:
    found = []
    for given in ({}, {"hypernet": starter / FOLDER / "document"}):
        model = MoLoRAModel.from_pretrained(starter, dtype=torch.float32)
        model.internalize(DOCUMENT, name="lamp", **given)
        found.append(model(asked(model), selection={"document": "lamp"}).logits)
    assert torch.equal(*found) and not torch.equal(found[0], model(asked(model), selection={"document": None}).logits)


def test_the_commands_need_none_either(starter: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "lamp.txt").write_text(DOCUMENT)
    model = ["--model", str(starter)]
    found = run(capsys, "internalize", str(tmp_path / "lamp.txt"), "--as", "user/lamp", *model)
    assert (found["adapter"], found["version"]) == ("user/lamp", 1)
    history = write_history(tmp_path / "ada.jsonl", "blue, of course")
    assert run(capsys, "profile", "user", "ada", "--history", str(history), *model)["adapter"] == "user/ada"
    with pytest.raises(
        HypernetError, match="adapters of a description is shipped.*train one with `molora train hypernet"
    ):
        app(["describe", "likes blue", "--as", "user/fan", *model], standalone_mode=False)


@pytest.mark.parametrize(
    "line",
    [
        ["internalize", "lamp.txt", "--as", "user/lamp"],
        ["profile", "user", "ada", "--history", "ada.jsonl"],
        ["assemble", "user", "ada", "--history", "ada.jsonl", "--pool", "pieces"],
        ["describe", "likes blue", "--as", "user/fan"],
    ],
    ids=lambda line: line[0],
)
def test_what_is_written_to_is_named(line: list[str]) -> None:
    """The shipped stack gets no adapter by mistake."""
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2 and "--model" in done.output


def test_another_base_is_told_which_one_and_how_to_train(starter: Path, tmp_path: Path) -> None:
    name = json.loads((starter / FOLDER / "document" / "hypernet.json").read_text())["base"]
    assert set(all_shipped(name)) == {"document", "profile"} and all_shipped("some/other") == {}
    for kind in ("document", "profile"):
        with pytest.raises(HypernetError) as refused:
            shipped(kind, "some/other")
        for told in (name, "base is some/other", f"`{TRAINED_BY[kind]} base=some/other`"):
            assert told in str(refused.value)
    model = make_spoken(tmp_path / "more")
    model.base_name = "some/other"
    with pytest.raises(HypernetError, match="some/other"):
        model.internalize(DOCUMENT)
    assert [layer.name for layer in model.stack.layers] == ["domain", "user"]


def test_where_there_is_none_or_it_is_damaged(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (starter / FOLDER / "document" / "hypernet.json").write_text("[]")
    with pytest.raises(HypernetError, match="is damaged"):
        shipped("document", "any")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(StackError, match=f"{VARIABLE} is .*holds no molora.json"):
        shipped("document", "any")
    assert all_shipped("any") == {}


def test_they_are_no_part_of_the_stack(starter: Path, tmp_path: Path) -> None:
    MoLoRAModel.from_pretrained(starter).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / FOLDER).exists()
    assert FOLDER not in json.dumps(describe(str(starter)))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("models/smollm2-135m-instruct", True),
        ("/cache/base/HuggingFaceTB--SmolLM2-135M-Instruct", True),
        ("/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f7", True),
        ("HuggingFaceTB/SmolLM2-135M", False),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", False),
    ],
)
def test_names_of_one_base(name: str, same: bool) -> None:
    assert same_base(name, "HuggingFaceTB/SmolLM2-135M-Instruct") == same


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_network_finds_a_number_in_filler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the starter, asked without the document; the router decides where the document's adapter acts."""
    monkeypatch.delenv(VARIABLE, raising=False)
    model = MoLoRAModel.from_pretrained(starter_folder())

    def says(question: str, number: str, document: str | None) -> bool:
        inputs = model.encode([{"role": "user", "content": question}])
        said = model.generate(
            **inputs, selection={"document": document, "domain": None}, max_new_tokens=10, do_sample=False
        )
        return number in model.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :])

    found, guessed = 0, 0
    lessons = Needles(tokens=(32, 192), count=3).held_out()["needles"]
    for lesson in lessons:
        ((question, answer),) = lesson.questions
        number = answer.rstrip(".").split()[-1]
        (tmp_path / "filler.txt").write_text(lesson.text)
        model.internalize(tmp_path / "filler.txt")
        found += says(question, number, "auto")
        guessed += says(question, number, None)
        model.reset()
    assert (found, guessed) == (len(lessons), 0)
