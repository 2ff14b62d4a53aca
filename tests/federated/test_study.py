"""The study on a tiny model: its runs are shared and kept, and its table is what they say."""

import json
from pathlib import Path

import pytest
import torch

from molora.errors import ConfigError, DataError
from molora_training.federated import private, study
from molora_training.federated.settings import LocalSettings
from molora_training.federated.study import ALONE, BASE, CENTRAL, FLEX, FORWARD, NAIVE, NAMES, StudySettings, run
from tests.federated.parties import ANSWERS


@pytest.fixture
def settings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySettings:
    # The accountant is a package of its own; its figures have their own tests.
    monkeypatch.setattr(private, "noise_multiplier", lambda wanted, *_: 0.1 / wanted)
    monkeypatch.setattr(private, "epsilon", lambda multiplier, *_: 0.1 / multiplier)
    data = tmp_path / "data"
    data.mkdir()
    for name, answer in ANSWERS.items():
        for split, first in (("train", 0), ("test", 40)):
            rows = [
                {"messages": [{"role": "user", "content": f"{n:02}"}, {"role": "assistant", "content": answer}]}
                for n in range(first, first + 20)
            ]
            (data / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = LocalSettings(examples=8, learning_rate=1e-2, batch_tokens=256, max_length=64)
    return StudySettings(
        tuple(ANSWERS), data, str(folder / "base"), 2, 2, (2, 4), local, tests=6, cohorts=2, clip=0.5
    )  # fmt: skip


def test_a_study(settings: StudySettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "federated.json"
    assert run(settings, out, "command", (0, 2)) is None and not out.exists()
    report = run(settings, out, "command", (1, 2))
    assert report is not None and json.loads(out.read_text()) == json.loads(json.dumps(report))
    capsys.readouterr()
    assert run(settings, out, "command") == report and capsys.readouterr().out == ""  # nothing runs twice
    rows = {row["way"]: row for row in report["rows"]}
    assert list(rows) == [BASE, *NAMES]
    kept = [json.loads((tmp_path / "out" / ".federated" / f"flexlora-{seed}.json").read_text()) for seed in range(2)]
    before = json.loads((tmp_path / "out" / ".federated" / "base-0.json").read_text())
    loss = torch.tensor([one["losses"] for one in kept]).mean()
    assert rows[FLEX]["loss"] == pytest.approx(float(loss)) and kept[0]["losses"] != kept[1]["losses"]
    gain = torch.tensor(before["losses"]).mean() - loss
    assert rows[FLEX]["gain"] == pytest.approx(float(gain), rel=1e-4) and rows[FLEX]["gain"] > 0.2
    assert rows[FLEX]["gain_of_central"] == pytest.approx(rows[FLEX]["gain"] / rows[CENTRAL]["gain"])
    low, high = rows[FLEX]["gain_interval"]
    assert low < rows[FLEX]["gain"] < high
    assert (
        rows[CENTRAL]["gain"] > 0.2 < rows[ALONE]["gain"] and rows[FLEX]["rounds"] == 2 and rows[FORWARD]["rounds"] >= 1
    )
    assert rows["stack"]["bytes_down"] > rows[FLEX]["bytes_down"] > 0
    assert [rows[f"private, epsilon {wanted}"]["privacy"]["epsilon"] for wanted in (8, 1)] == pytest.approx([8, 1])
    musts = {one["name"]: one for one in report["must"]}
    assert len(musts) == 4
    apart = rows[FLEX]["gain_interval"][0] - rows[NAIVE]["gain_interval"][1]
    assert musts["between the intervals of FlexLoRA and the naive form, nats"]["value"] == pytest.approx(apart)


def test_an_interval_covers_the_mean_of_clients() -> None:
    low, high = study._interval(torch.arange(20.0).repeat(2, 1))
    assert 6 < low < 8 and 11 < high < 13  # 9.5 and 1.96 times 5.77 / sqrt(20)


def test_a_study_without_data_says_so(settings: StudySettings, tmp_path: Path) -> None:
    missing = StudySettings(("ada", "bob", "eve"), settings.data, settings.base)
    with pytest.raises(DataError, match="test data of eve"):
        run(missing, tmp_path / "x.json", "command")
    for clients in (("ada", "bob"), ("ada", "bob", "ada")):
        with pytest.raises(ConfigError, match="three clients or more"):
            StudySettings(clients, settings.data, settings.base)
