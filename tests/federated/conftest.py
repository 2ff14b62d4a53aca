"""Flower has an environment of its own (`make federated`): where it is missing, what needs it is not collected."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from molora_training.federated.client import Base, Client
from tests.federated.parties import ANSWERS, make_parties

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
if find_spec("flwr") is None:
    collect_ignore = ["test_server.py", "test_simulation.py", "test_hosts.py"]
if find_spec("dp_accounting") is None:
    collect_ignore = [*globals().get("collect_ignore", []), "test_accounting.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`~tests.federated.parties.make_parties`."""
    return make_parties(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def clients(folder: Path) -> dict[str, Client]:
    base = Base.load(str(folder / "base"))
    return {name: Client.of_file(name, base, folder / "data" / f"{name}.jsonl") for name in ANSWERS}
