"""``molora export``."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import SelectionError
from molora.vllm.folder import read_manifest
from tests.vllm.conftest import load_base, models  # noqa: F401 - a fixture


@pytest.fixture
def saved(models: dict, base: Path, tmp_path: Path) -> Path:  # noqa: F811
    model = models["averages"]
    model.base_name = str(base)  # which the command loads by its name
    model.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_stack_is_written_and_its_server_named(saved: Path, tmp_path: Path) -> None:
    given = ["export", str(saved), "--out", str(tmp_path / "out"), "--select", "personality=law"]
    shown = CliRunner().invoke(app, given)
    assert shown.exit_code == 0, shown.exception
    (made,) = (tmp_path / "out").iterdir()
    assert read_manifest(made)["selection"] == {"personality": "law"}
    assert f"--max-lora-rank 16 --lora-modules {made.name}={made}" in shown.output and "domain/math" in shown.output
    told = json.loads(CliRunner().invoke(app, [*given, "--name", "ours", "--json"]).output)
    assert Path(told["folder"]).name.startswith("ours-") and told["rank"] == 16 and len(told["adapters"]) == 5


def test_a_router_of_hidden_states_needs_vllm_uncompiled(models: dict, base: Path, tmp_path: Path) -> None:  # noqa: F811
    for kind, eager in (("twice", True), ("gated", False)):
        models[kind].base_name = str(base)
        models[kind].save_pretrained(tmp_path / kind)
        shown = CliRunner().invoke(app, ["export", str(tmp_path / kind), "--out", str(tmp_path / "out")])
        assert ("--max-lora-rank 16 --enforce-eager --lora-modules" in shown.output) is eager


def test_a_selection_that_does_not_fit(saved: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["export", str(saved), "--out", str(tmp_path / "out"), "--select", "user=eve"])
    assert isinstance(refused.exception, SelectionError) and not list((tmp_path / "out").glob("*"))
