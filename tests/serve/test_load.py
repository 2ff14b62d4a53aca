"""The traffic of `molora bench serve`, and that what it tells is what was answered."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molora import MoLoRAModel
from molora.cli import app
from molora.errors import ConfigError, StackError
from molora.serve.load import Answered, report
from molora.serve.measure import measure_serve
from molora.serve.traffic import Traffic, arrivals
from tests.unit.spoken import make_spoken, save_spoken

FEW = Traffic(requests=12, rate=math.inf, users=3, zipf=1.0, prompt=(2, 6), answer=(3, 5), seed=2)


def test_users_ask_by_zipfs_law_at_random_times() -> None:
    coming = arrivals(Traffic(requests=20_000, rate=50.0, users=4, zipf=1.0, prompt=(2, 6), answer=(3, 5)))
    counts = Counter(one.user for one in coming)
    harmonic = sum(1 / k for k in (1, 2, 3, 4))
    for user in range(4):
        assert counts[user] / 20_000 == pytest.approx(1 / (user + 1) / harmonic, abs=0.015)
    gaps = [later.at - one.at for one, later in pairwise(coming)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)  # Poisson
    assert {one.prompt for one in coming} == {2, 3, 4, 5, 6} and {one.answer for one in coming} == {3, 4, 5}
    assert arrivals(FEW) == arrivals(FEW) and all(one.at == 0 for one in arrivals(FEW))


def test_a_report_is_of_whole_answers() -> None:
    found = [
        Answered(1.0, [1.5, 1.6, 1.8], "length"),
        Answered(2.0, [4.0, 5.0], "stop", count=4),
        Answered(2.5, [2.6], "error"),
        Answered(2.5),
    ]
    told = report(found)
    assert (told["answered"], told["refused"], told["failed"], told["seconds"]) == (2, 1, 1, 4.0)
    assert told["tokens a second"] == 7 / 4 and told["requests a second"] == 0.5
    assert told["seconds to the first token"]["p50"] == pytest.approx(1.25)
    assert told["seconds between tokens"]["p50"] == pytest.approx(0.2)


@pytest.fixture
def model(tmp_path: Path) -> MoLoRAModel:
    return make_spoken(tmp_path)


def test_each_is_answered_in_both_ways(model: MoLoRAModel) -> None:
    ticks: list[int] = []
    found = measure_serve(model, FEW, rows=2, live=2, rank=2, tick=lambda: ticks.append(1))
    one, own = found["rows"]
    assert (one["kind"], own["kind"]) == ("one adapter", "own adapters") and len(ticks) == 24
    users = len({coming.user for coming in arrivals(FEW)})
    assert one["answered"] == own["answered"] == 12
    assert (one["pool"]["reads"], own["pool"]["reads"]) == (1, users)
    assert own["pool"]["live_hits"] + own["pool"]["host_hits"] == 12
    assert found["ratio"] == pytest.approx(own["tokens a second"] / one["tokens a second"], abs=1e-3)
    assert not model.stack["user"].adapters  # as before


def test_all_adapters_are_there_before_the_first_request(model: MoLoRAModel) -> None:
    found = measure_serve(model, FEW, rows=2, live=3, rank=2, modules=["q_proj"], there=3)
    own = found["rows"][1]
    assert own["answered"] == 12 and own["pool"]["reads"] == 3  # whoever asks
    assert own["pool"]["live_hits"] == 12 and own["pool"]["host_hits"] == 3  # as they were brought
    with pytest.raises(ConfigError, match="3 adapters cannot be there: 2 can be live"):
        measure_serve(model, FEW, rows=2, live=2, rank=2, there=3)


def test_a_stack_without_a_layer_for_users_is_refused(model: MoLoRAModel) -> None:
    model.stack["user"].shared = False
    with pytest.raises(StackError, match="shared: true"):
        measure_serve(model, FEW, rows=2, live=2, rank=2)


def test_the_command(model: MoLoRAModel, tmp_path: Path) -> None:
    saved = save_spoken(model, tmp_path / "saved")
    given = ["bench", "serve", str(saved), "--requests", "4", "--rate", "0", "--users", "2", "--rank", "2"]
    given += ["--prompt", "2:4", "--answer", "2:3", "--dtype", "float32"]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "own adapters" in shown.output and "of the pace with one" in shown.output
    told = json.loads(CliRunner().invoke(app, [*given, "--json"]).output)
    assert told["traffic"]["rate"] is None  # all at once, and no number of JSON
    assert [row["answered"] for row in told["rows"]] == [4, 4] and told["command"].endswith("--rank 2")
    for wrong in ("9:8", "x"):
        refused = CliRunner().invoke(app, [*given, "--prompt", wrong])
        assert refused.exit_code != 0 and wrong in str(refused.exception)
