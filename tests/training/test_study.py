"""The study of a sequence of tasks on a tiny model: its scores are what PEFT says, and its parts add up."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from molora.chat import render
from molora.cli import app
from molora.errors import ConfigError, DataError
from molora_training.continual import study
from molora_training.continual.growth import blank
from molora_training.continual.measures import measures
from molora_training.continual.methods import METHODS
from molora_training.continual.study import (
    APART,
    INVENTED,
    JOINT,
    METHOD,
    NAMES,
    SMOLORA,
    StudySettings,
    order_of,
    run,
    sequences,
)
from tests.unit.spoken import make_spoken

ANSWERS = {"ayes": "aye aye", "nos": "no sir", "hums": "hm hm hm"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySettings:
    monkeypatch.chdir(tmp_path)
    model = make_spoken(tmp_path / "adapters")
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for number, (task, answer) in enumerate(ANSWERS.items()):
        for split, first in (("train", 0), ("validation", 20), ("test", 40)):
            rows = []
            for n in range(first, first + 12):
                said = [{"role": "user", "content": f"{number}{n}"}, {"role": "assistant", "content": answer}]
                rows.append({"id": f"{task}{n}", "domain": task, "split": split, "messages": said})
            (tmp_path / "data" / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StudySettings(
        tuple(ANSWERS), tmp_path / "data", str(tmp_path / "base"), 1, 1, 12, 8, 10, rank=8,
        learning_rate=3e-2, epochs=6, max_length=64, batch_tokens=256,
    )  # fmt: skip


FEW = ("sequential", "replay")
HELD = ("elastic", "orthogonal", "sd-lora", "treelora", "inflora, replay", INVENTED)  # a way of each kind
MORE = (*HELD, *APART, SMOLORA)
SOME = (*FEW, *MORE)


def test_a_study_of_three_tasks(
    settings: StudySettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "NAMES", SOME)
    assert {method for method, _ in METHOD.values()} == set(METHODS) and set(NAMES) == {*METHOD, *APART, SMOLORA}
    out = tmp_path / "out" / "continual.json"
    assert run(settings, out, "command", (0, 2)) is None and not out.exists()
    report = run(settings, out, "command", (1, 2))
    assert report is not None and json.loads(out.read_text()) == json.loads(json.dumps(report))
    capsys.readouterr()
    assert run(settings, out, "command") == report and capsys.readouterr().out == ""  # nothing runs twice
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == [JOINT, *SOME] and len(list(sequences(settings))) == 1 + len(SOME)
    kept = json.loads((out.parent / ".continual" / "replay-0-0.json").read_text())
    assert sorted(kept["tasks"]) == sorted(ANSWERS) and kept["tasks"] == order_of(settings, 0)
    found = measures(kept["after"], kept["before"])
    assert rows["replay"]["average"] == pytest.approx(found.average) == pytest.approx(rows["replay"]["curve"][-1])
    assert rows["replay"]["forgetting"] == pytest.approx(found.forgetting)
    assert rows["replay"]["text_bytes"] > 0 == rows["sequential"]["text_bytes"]
    assert rows["elastic"]["state_bytes"] > 0 == rows["replay"]["state_bytes"]
    assert all(rows[name]["state_bytes"] > 0 for name in ("inflora, replay", "sd-lora", "treelora"))
    assert all(rows[name]["rank"] == 8 + 3 * 8 for name in ("orthogonal", "inflora, replay", "sd-lora"))
    assert all(rows[name]["rank"] == 3 * 8 for name in APART)
    assert rows["replay"]["rank"] == rows["treelora"]["rank"] == rows[SMOLORA]["rank"] == 8
    for name in (*APART, SMOLORA):
        apart = json.loads(
            (out.parent / ".continual" / f"{name.replace(', ', '-').replace(' ', '-')}-0-0.json").read_text()
        )
        assert rows[name]["state_bytes"] > 0 == rows[name]["text_bytes"]
        assert apart["after"][0][0] > apart["before"][0] + 10
    assert rows[JOINT]["average"] > 10 and kept["after"][0][0] > kept["before"][0] + 10
    assert report["must"][1]["value"] == pytest.approx(rows["replay"]["average"] / rows[JOINT]["average"])
    monkeypatch.setattr(study, "NAMES", FEW)
    run(StudySettings(**{**vars(settings), "epochs": 1}), out, "command")  # another study
    assert capsys.readouterr().out.count("order") == 1 + len(FEW)


@torch.no_grad()
def test_a_score_is_what_peft_finds_likeliest(settings: StudySettings, tmp_path: Path) -> None:
    blank(settings.base, 4, tmp_path / "blank")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(settings.base)
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    model = PeftModel.from_pretrained(base, tmp_path / "blank", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "some", save_embedding_layers=False)
    texts = {task: study._texts(settings, task) for task in settings.tasks}
    scorer = study.Scorer(settings, {task: texts[task]["test"] for task in settings.tasks})
    scorer(tmp_path / "blank", settings.tasks)  # what was scored before does not count
    found = scorer(tmp_path / "some", settings.tasks)
    for task, score in zip(settings.tasks, found, strict=True):
        right = count = 0
        for row in texts[task]["test"]:
            asked = render(tokenizer, row["messages"][:1], add_generation_prompt=True)
            prompt = len(tokenizer(asked, add_special_tokens=False).input_ids)
            ids = tokenizer(render(tokenizer, row["messages"]), add_special_tokens=False, return_tensors="pt").input_ids
            end = prompt + len(ANSWERS[task]) + 1
            right += int((model.eval()(ids).logits[0, prompt - 1 : end - 1].argmax(-1) == ids[0, prompt:end]).sum())
            count += end - prompt
        assert score == pytest.approx(100 * right / count)


def test_a_blank_adapter_changes_nothing(settings: StudySettings, tmp_path: Path) -> None:
    blank(settings.base, 4, tmp_path / "blank")
    ids = torch.arange(5, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(settings.base).eval()
    with torch.no_grad():
        expected = base(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "blank").eval()(ids).logits
    assert torch.equal(found, expected)


def test_bad_studies_are_named(settings: StudySettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two tasks or more"):
        StudySettings(("ayes",), settings.data)
    with pytest.raises(ConfigError, match="must be positive"):
        StudySettings(("ayes", "nos"), settings.data, orders=0)
    with pytest.raises(ConfigError, match="multiple of 8, not 12"):
        StudySettings(("ayes", "nos"), settings.data, rank=12)
    file = settings.data / "ayes.test.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="ayes has 1 conversations to test"):
        run(settings, tmp_path / "out.json", "command")


def test_the_command(settings: StudySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "NAMES", FEW)
    line = ["eval", "continual", "ayes", "nos", "--data", str(settings.data), "--base", settings.base]
    line += ["--out", str(tmp_path / "x.json"), "--orders", "1", "--seeds", "1", "--examples", "8", "--tests", "8"]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    assert "forgetting of the default" in found.output
    assert "--orders 1 --seeds 1 --examples 8 --tests 8" in json.loads((tmp_path / "x.json").read_text())["command"]
