"""``molora serve --engine vllm``: what vLLM's server is told."""

import os
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from molora.cli import app
from molora.errors import BackendError, RouterError
from molora.vllm import launch
from molora.vllm.folder import read_manifest
from tests.vllm.conftest import models  # noqa: F401 - a fixture
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


def test_what_cannot_be_served_so_is_said_before(started: list[Any]) -> None:
    assert isinstance(CliRunner().invoke(app, ["serve", "--engine", "vllm"]).exception, RouterError)  # the starter's
    assert not started


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(saved: Path) -> None:  # noqa: F811
    error = CliRunner().invoke(app, ["serve", str(saved), "--engine", "vllm"]).exception
    assert isinstance(error, BackendError) and "molora[vllm]" in str(error)
