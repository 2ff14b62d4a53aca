"""The study of users on a tiny model: each update is a real one, and the figures are the updates' own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import ConfigError, DataError
from molora_training.continual import stream
from molora_training.continual.memory import held_out
from molora_training.continual.stream import StreamSettings, run
from tests.unit.spoken import make_spoken


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamSettings:
    monkeypatch.chdir(tmp_path)
    model = make_spoken(tmp_path / "adapters")
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for user, answer, split in (("ada", "aye aye", "train"), ("bo", "no sir", "train"), ("rest", "hm", "validation")):
        rows = [
            {"id": f"{user}{n}", "domain": user, "split": split,
             "messages": [{"role": "user", "content": f"{user}{n}"}, {"role": "assistant", "content": answer}]}
            for n in range(75)
        ]  # fmt: skip
        (tmp_path / "data" / f"{user}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StreamSettings(
        ("ada", "bo"), "rest", tmp_path / "data", str(tmp_path / "base"), updates=3, conversations=25,
        general_count=25, rank=4, learning_rate=1e-2, epochs=3, max_length=64, batch_tokens=256,
    )  # fmt: skip


def test_a_study_of_two_users(settings: StreamSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "stream.json"
    assert run(settings, out, "command", (1, 2)) is None and not out.exists()
    report = run(settings, out, "command", (0, 2))
    assert report is not None and json.loads(out.read_text()) == json.loads(json.dumps(report))
    capsys.readouterr()
    assert run(settings, out, "command") == report and capsys.readouterr().out == ""  # nobody runs twice
    ada, bo = (json.loads((out.parent / ".stream" / f"{user}.json").read_text()) for user in settings.users)
    assert [row["user"] for row in report["rows"]] == ["ada", "bo"]
    for user, row in zip((ada, bo), report["rows"], strict=True):
        assert len(user["updates"]) == 3 and len(user["drift"]) == 2 and row["text_bytes"] > 0
        assert row["promoted"] == sum(one["promoted"] for one in user["updates"])
        assert len(row["why_not"]) == 3 - row["promoted"]
        first, second = user["updates"][:2]
        assert first["kept"] is None and (second["replayed"] > 0) == first["promoted"]
        assert first["general"]["before"] == pytest.approx(user["general"]["base"], rel=1e-4)  # blank: as the base
    both = ada["updates"] + bo["updates"]
    assert any(one["promoted"] for one in both)
    better = [one["promoted"] and one["learnt"]["after"] < one["learnt"]["before"] for one in both]
    assert report["must"][0]["value"] == pytest.approx(sum(better) / 6)
    growth = [abs(user["general"]["adapter"] / user["general"]["base"] - 1) for user in (ada, bo)]
    assert [line["value"] for line in report["must"][3:]] == pytest.approx([sum(growth) / 2, max(growth)])
    run(replace(settings, epochs=1), out, "command")
    assert capsys.readouterr().out.count("updates serve") == 2  # another study


def test_bad_studies_are_named(settings: StreamSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each once, not ada, ada"):
        replace(settings, users=("ada", "ada"))
    with pytest.raises(ConfigError, match="two updates or more"):
        replace(settings, updates=1)
    with pytest.raises(DataError, match="ada has 75 conversations, too few for 4 updates of 25"):
        run(replace(settings, updates=4), tmp_path / "out.json", "command")


def test_each_update_has_some_to_learn_and_some_to_judge_by(settings: StreamSettings) -> None:
    five = replace(settings, conversations=5, updates=12)  # of five, a third of the parts would have none held out
    parts, rows = stream._text(five, "ada"), stream._rows(five.data / "ada.train.jsonl")
    assert len(parts) == 12 and any(len(part) > 5 for part in parts)
    for part in parts:
        assert len({held_out(row) for row in part}) == 2
        assert len(part) == 5 or len({held_out(row) for row in part[:-1]}) == 1
    assert [row for part in parts for row in part] == rows[: sum(map(len, parts))]


def test_the_command(settings: StreamSettings, tmp_path: Path) -> None:
    line = ["eval", "stream", "ada", "--general", "rest", "--data", str(settings.data), "--base", settings.base]
    line += ["--out", str(tmp_path / "x.json"), "--updates", "2", "--conversations", "30"]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0, found.output
    assert "updates that serve" in found.output
    assert "--updates 2 --conversations 30" in json.loads((tmp_path / "x.json").read_text())["command"]
