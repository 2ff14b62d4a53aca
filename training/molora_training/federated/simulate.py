"""Clients and server on one machine, in Flower's simulation: the same apps as over many hosts."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it when it is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # somebody waits for these clients

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from molora.base import base_folder
from molora.errors import ConfigError
from molora_training.federated.flower_client import Who, client_app
from molora_training.federated.flower_server import Watch, serve
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import FederateSettings

_ENDS = ".train.jsonl", ".jsonl"


def client_files(settings: FederateSettings, count: int | None = None) -> dict[str, Path]:
    """The file of each client of a simulation, ``count`` of them if that is given.

    Raises:
        ConfigError: there are fewer, or one is not there.
    """
    found: dict[str, Path] = {}
    for path in sorted(settings.data.glob("*.jsonl")):
        if not path.name.endswith((".validation.jsonl", ".test.jsonl")):
            name = next(path.name.removesuffix(end) for end in _ENDS if path.name.endswith(end))
            found[name] = path.resolve()
    names = settings.clients or tuple(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ConfigError(f"{settings.data} has no {unknown[0]}.jsonl and no {unknown[0]}.train.jsonl.")
    if len(names) < (count or 1):
        raise ConfigError(f"{settings.data} has conversations of {len(names)} clients, not of {count or 1}.")
    return {name: found[name] for name in names[:count]}


def simulate(
    settings: FederateSettings, files: Mapping[str, Path], federation: Federation, watch: Watch
) -> dict[str, Any]:
    """All rounds that are left, with as many clients at a time as the machine has processors.

    Returns:
        As :func:`molora_training.federated.flower_server.serve`.

    Raises:
        FederationError, ConfigError: as there.
    """
    base = str(base_folder(settings.base))  # or each process would fetch it
    ranks, secure = settings.ranks, settings.privacy.secure
    everyone = [
        Who(name, str(file), ranks[number % len(ranks)], base, secure)
        for number, (name, file) in enumerate(files.items())
    ]
    found: dict[str, Any] = {}
    errors: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            found.update(serve(grid, context, federation, watch))
        except BaseException as error:
            errors.append(error)

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what it would say is told by `watch`
    run_simulation(server, _clients(everyone), len(everyone), backend_config=_backend())
    if errors:
        raise errors[0]
    return found


def _clients(everyone: list[Who]) -> ClientApp:
    return client_app(lambda context: everyone[int(context.node_config["partition-id"])])


def _backend() -> Any:
    """One processor for each client; the GPU, where there is one, is shared by all that run."""
    processors = os.cpu_count() or 1
    share = 1 / processors if torch.cuda.is_available() else 0.0
    start = {"num_cpus": processors, "log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    return {"init_args": start, "client_resources": {"num_cpus": 1, "num_gpus": share}}
