"""A study of routers under arrivals and departures on a tiny model: who is there, what is measured, what it reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import ConfigError, DataError
from molora_training.continual import arrivals
from molora_training.continual.arrivals import ALONE, ANEW, REPLAY, SKETCHES, WAYS, ArrivalSettings, events, run
from tests.training.test_router_update import write_data
from tests.unit.spoken import make_spoken

TEXTS = {
    "sums": "12+34=46 78*9=702", "python": "def f(x): return x", "shouts": "HEY! STOP! GO!", "greek": "αβγδ εζηθ ικλμ",
    "dots": "... --- ... .-.-",
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrivalSettings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrivals, "SHORT", (20, 0, 0, 0))
    model = make_spoken(tmp_path / "adapters")
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[union-attr]
    data = write_data(tmp_path / "data", TEXTS)
    for name in TEXTS:
        rows = [json.loads(line) for line in (data / f"{name}.validation.jsonl").read_text().splitlines()]
        tests = [json.dumps({**row, "id": f"{row['id']}-test", "split": "test"}) + "\n" for row in rows]
        (data / f"{name}.test.jsonl").write_text("".join(tests))
    return ArrivalSettings(
        tuple(TEXTS), data, str(tmp_path / "base"), 2, mixed=30, documents=0, in_a_turn=0, asides=0, batch_tokens=1024
    )


def test_who_comes_and_who_leaves() -> None:
    many = ArrivalSettings(tuple(f"a{n}" for n in range(20)), Path(), first=8)
    found = events(many, 0)
    assert [name for kind, name in found if kind == "comes"] == [f"a{n}" for n in range(8, 20)]
    assert [kind for kind, _ in found] == ["comes", "comes", "comes", "leaves"] * 4
    there = set(many.names[:8])
    for kind, name in found:
        (there.add if kind == "comes" else there.remove)(name)  # none leaves that is not there
    assert len(there) == 16 and events(many, 0) == found != events(many, 1)
    for first in (1, 20):
        with pytest.raises(ConfigError, match="Two adapters or more are there first"):
            replace(many, first=first)


def test_a_study(settings: ArrivalSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "arrivals.json"
    assert run(settings, out, "command", (0, 2)) is None
    report = run(settings, out, "command", (1, 2))
    assert report is not None and json.loads(out.read_text()) == json.loads(json.dumps(report))
    capsys.readouterr()
    assert run(settings, out, "command") == report and "seed 0" not in capsys.readouterr().out  # nothing runs twice
    rows = {row["way"]: row for row in report["rows"]}
    assert list(rows) == list(WAYS)
    assert len({json.dumps(row["points"][0]) for row in rows.values()}) == 1  # all begin with the same router
    assert all(len(row["points"]) == 2 for row in rows.values())  # and after the one departure
    last = {way: row["points"][-1]["mixed"] for way, row in rows.items()}
    assert last[REPLAY] > last[ALONE] and last[SKETCHES] > last[ALONE] and last[ANEW] > last[ALONE]
    there = json.loads((out.parent / ".arrivals" / "replay-0.json").read_text())["there"]
    size = sum((settings.data / f"{name}.train.jsonl").stat().st_size for name in there)
    assert rows[ANEW]["text_bytes"] == size and rows[SKETCHES]["text_bytes"] == 0 < rows[SKETCHES]["sample_bytes"]
    assert rows[REPLAY]["text_bytes"] == size and rows[REPLAY]["sample_bytes"] == 0  # twelve examples are fewer than 64


def test_bad_input_is_named(settings: ArrivalSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no nothing.train.jsonl"):
        run(replace(settings, names=(*TEXTS, "nothing")), tmp_path / "out.json", "command")


def test_the_command(settings: ArrivalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[ArrivalSettings] = []

    def fake(found: ArrivalSettings, out: Path, command: str, share: tuple[int, int]) -> dict[str, object]:
        kept.append(found)
        point = {"first": 0.5, "came": 0.25, "mixed": 0.125}
        return {"rows": [{"way": "sketches", "points": [point]}], "command": command}

    monkeypatch.setattr(arrivals, "run", fake)
    line = ["eval", "arrivals", *TEXTS, "--data", str(settings.data), "--first", "3"]
    found = CliRunner().invoke(app, line)
    assert found.exit_code == 0 and "sketches         first 50.0%, came 25.0%, mixed 12.5%" in found.output
    assert kept[0].names == tuple(TEXTS) and kept[0].first == 3
    told = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert told["command"] == f"molora eval arrivals {' '.join(TEXTS)} --first 3"
