"""``molora serve --engine vllm``: what vLLM's server is told."""

import os
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from molora import MoLoRAModel, Stack, StackLayer
from molora.cli import app
from molora.errors import BackendError, UnsupportedAdapterError
from molora.vllm import launch
from molora.vllm.export import export
from molora.vllm.folder import read_manifest
from tests.vllm.conftest import (
    load_base,
    models,  # noqa: F401 - a fixture
    write_adapter,
)
from tests.vllm.test_command import saved  # noqa: F401 - a fixture


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What becomes of the process: program, arguments, environment."""
    told: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: told.extend(given))
    monkeypatch.setattr(launch, "find_spec", lambda _: True)
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    return told


def test_the_stack_is_exported_and_served(saved: Path, base: Path, started: list[Any], tmp_path: Path) -> None:  # noqa: F811
    given = ["serve", str(saved), "--engine", "vllm", "--port", "9000", "--rows", "4", "--longest", "300"]
    found = CliRunner().invoke(app, [*given, "--tensor-parallel", "2", "--ray", "--dtype", "float32"])
    program, told, environment = started
    (made,) = (tmp_path / "cache" / "exported").iterdir()
    assert f"stack={made}" in told and program == told[0] == sys.executable
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0" and 'Ask for the model "stack"' in found.output
    pairs = dict(pairwise(told))
    wanted = {
        "--model": str(base), "--served-model-name": "base", "--max-lora-rank": str(read_manifest(made)["rank"]),
        "--host": "127.0.0.1", "--port": "9000", "--dtype": "float32", "--max-num-seqs": "4", "--max-model-len": "300",
        "--tensor-parallel-size": "2", "--distributed-executor-backend": "ray",
    }  # fmt: skip
    assert {name: pairs[name] for name in wanted} == wanted
    assert "--enforce-eager" not in told


def test_a_router_of_hidden_states_needs_vllm_uncompiled(models: Any, base: Path, tmp_path: Path) -> None:  # noqa: F811
    models["deep"].base_name = str(base)
    models["deep"].save_pretrained(tmp_path / "deep")
    made = export(tmp_path / "deep", tmp_path / "out")
    assert "--enforce-eager" in launch.arguments(made, "127.0.0.1", 9000, 4, 300, "float32", 1, False)


def test_what_cannot_be_served_so_is_said_before(base: Path, started: list[Any], tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "head", 1, {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]})
    MoLoRAModel.from_base(load_base(base), Stack([StackLayer("domain", {"head": tmp_path / "head"})])).save_pretrained(
        tmp_path / "mine"
    )
    found = CliRunner().invoke(app, ["serve", str(tmp_path / "mine"), "--engine", "vllm"])
    assert isinstance(found.exception, UnsupportedAdapterError)
    assert not started


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(saved: Path) -> None:  # noqa: F811
    error = CliRunner().invoke(app, ["serve", str(saved), "--engine", "vllm"]).exception
    assert isinstance(error, BackendError) and "molora[vllm]" in str(error)
