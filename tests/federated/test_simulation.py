"""`molora federate run`: clients and server in Flower's simulation, a report, and a version that passed its gate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from molora import MoLoRAModel
from molora.cli import app
from molora.errors import ConfigError, FederationError
from molora.router import NEVER
from molora.versions import Versions
from molora_training.federated.lora import Lora, distance
from molora_training.federated.outcome import Into
from molora_training.federated.place import Begun, only_server, state_folder
from molora_training.federated.settings import FederateSettings
from molora_training.federated.simulate import client_files
from tests.federated.parties import RANKS, with_samples

LOCAL = ["local.examples=12", "local.learning_rate=0.01", "local.batch_tokens=256", "local.max_length=64"]


def federate(folder: Path, out: Path, *more: str) -> Result:
    settings = [f"data={folder / 'data'}", f"out={out}", f"base={folder / 'base'}", *LOCAL, "limits.seconds=100"]
    return CliRunner().invoke(app, ["federate", "run", "--simulate", "4", "ranks=[2,4,8]", *settings, *more])


def test_a_simulation_is_interrupted_and_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    first = federate(folder, out, "rounds=1")
    assert first.exit_code == 0, first.output
    shutil.rmtree(out)
    second = federate(folder, out, "rounds=2", "--json")
    assert second.exit_code == 0, second.output
    told = json.loads(second.stdout)
    assert told == json.loads((tmp_path / "adapter.report.json").read_text())
    assert [one["round"] for one in told["rounds"]] == [1, 2]
    assert told["learnt"]["after"] < 0.95 * told["learnt"]["before"]  # from before the first of them
    assert {name: own["rank"] for name, own in told["clients"].items()} == RANKS
    for own in told["clients"].values():
        assert own["rounds"] == 2 and own["peak_bytes"] > 2**20
        assert min(own["bytes_up"], own["bytes_down"], own["seconds"]) > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), out)
    assert model.peft_config["default"].r == 8
    assert "serves" not in first.output and "nats a token" in first.stdout


def test_a_private_masked_training_becomes_a_version(folder: Path, tmp_path: Path) -> None:
    """SecAgg+ and DP-FTRL together; what it lost on general conversations alone decides."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    general = folder / "data" / "ada.jsonl"
    result = federate(
        folder, tmp_path / "unused", "aggregate=shared", "privacy.secure=true", "privacy.epsilon=1000",
        "privacy.clip=0.3", "rounds=2", "--into", str(model), "domain", "math", "--general", str(general), "--json",
    )  # fmt: skip
    assert result.stdout, result.exception
    told = json.loads(result.stdout)
    assert told["privacy"]["epsilon"] <= 1000 and told["privacy"]["rounds"] == 2
    assert told["learnt"] is None and told["losses"] == {"before": {}, "after": {}}
    assert all(one["noise"] > 0 and len(one["clients"]) == 4 for one in told["rounds"])
    kept = told["version"]
    version = Versions(model, "domain", "math")[kept["version"]]
    assert version.metrics["privacy"]["delta"] == 1e-5
    begun = Begun.read(tmp_path / "unused")
    assert begun is not None
    run = Into(model, "domain", "math", general).mark(begun.run, 2)
    assert version.data == {"clients": 4, "rounds": 2, "run": run}
    assert kept["general"]["conversations"] == 30
    grew = kept["general"]["after"] / kept["general"]["before"] - 1
    assert (result.exit_code == 0) == kept["promoted"] == (grew <= 0.02)
    served = MoLoRAModel.from_pretrained(model).stack["domain"].adapters["math"]
    assert (Path(served) == Versions(model, "domain", "math").path(version.number)) == kept["promoted"]
    start = Lora.from_folder(folder / "adapters" / "math")
    assert distance(Lora.from_folder(Versions(model, "domain", "math").path(version.number)), start) > 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"clients": ("ada", "eve")}, "no eve.jsonl"),
        ({"data": Path("nowhere")}, "of 0 clients"),
    ],
)
def test_clients_that_are_not_there(folder: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        client_files(FederateSettings(**{"data": folder / "data", **change}))


def test_clients_are_files_by_name(folder: Path, tmp_path: Path) -> None:
    for name in ("b.train.jsonl", "b.validation.jsonl", "b.test.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    found = client_files(FederateSettings(data=tmp_path))
    assert {name: file.name for name, file in found.items()} == {"a": "a.jsonl", "b": "b.train.jsonl"}
    assert list(client_files(FederateSettings(data=folder / "data"), 2)) == ["ada", "bob"]
    with pytest.raises(ConfigError, match="of 4 clients, not of 5"):
        client_files(FederateSettings(data=folder / "data"), 5)


def test_a_new_adapter_comes_with_its_row(folder: Path, tmp_path: Path) -> None:
    model = with_samples(folder / "model", tmp_path / "model")
    result = federate(
        folder, tmp_path / "unused", "limits.max_forgetting=0.3", "rounds=2", "--into", str(model), "domain", "speech",
        "--json",
    )  # fmt: skip
    assert result.stdout, result.exception
    kept = json.loads(result.stdout)["version"]
    assert result.exit_code == 0 and kept["promoted"] and kept["learnt"]["after"] < kept["learnt"]["before"]
    served = MoLoRAModel.from_pretrained(model)
    assert "speech" in served.stack["domain"].adapters
    bias = served.router.parts[0].output.bias.detach()[served.router.rows.index("domain/speech")]  # type: ignore[union-attr]
    assert float(bias) > NEVER / 2


def test_a_run_that_was_killed_before_its_report_writes_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_samples(folder / "model", tmp_path / "model")
    line = ["limits.max_forgetting=0.3", "rounds=2", "--into", str(model), "domain", "speech", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("molora_training.report.write_report", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        assert "killed" in str(federate(folder, tmp_path / "unused", *line).exception)
    versions, report = Versions(model, "domain", "speech"), tmp_path / "unused.report.json"
    assert versions.current == 1 and not report.exists()
    again = federate(folder, tmp_path / "unused", *line)
    assert again.exit_code == 0, again.exception
    told = json.loads(report.read_text())
    assert told["version"]["version"] == 1 and told["version"]["promoted"] and len(told["rounds"]) == 2
    assert [one.number for one in versions.all()] == [1] and len(Versions(model).all()) == 2  # of the router


def test_a_row_has_no_noise(folder: Path, tmp_path: Path) -> None:
    model = with_samples(folder / "model", tmp_path / "model")
    privacy = ["aggregate=shared", "privacy.epsilon=8"]
    result = federate(folder, tmp_path / "unused", *privacy, "--into", str(model), "domain", "speech")
    assert isinstance(result.exception, ConfigError) and "does not cover that" in str(result.exception)


def test_what_an_adapter_goes_on_from(folder: Path) -> None:
    assert Into(folder / "model", "user", "eve").served() is None
    served = Into(folder / "model", "domain", "math").served()
    assert served is not None and served.is_dir()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["rnds=3"], "Unknown setting rnds"),
        (["aggregate=median"], "aggregate must be one of"),
        (["privacy.secure=true"], "aggregate: shared"),
        (["--general", "x.jsonl"], "--general is for the gate"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    folder: Path, tmp_path: Path, arguments: list[str], why: str
) -> None:
    result = federate(folder, tmp_path / "adapter", *arguments)
    assert result.exit_code == 1 and why in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_second_server_in_a_place_is_refused(folder: Path, tmp_path: Path) -> None:
    with only_server(out := tmp_path / "adapter"):
        second = federate(folder, out, "--no-resume")
    assert isinstance(second.exception, FederationError) and f"to end in {out}" in str(second.exception)
    assert [one.name for one in state_folder(out).iterdir()] == [".lock"]


def test_help_teaches() -> None:
    for command in ([], ["run"], ["app"]):
        told = CliRunner().invoke(app, ["federate", *command, "--help"])
        assert told.exit_code == 0 and "Example: molora federate" in " ".join(told.stdout.split())
