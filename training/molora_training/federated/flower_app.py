"""The app that `flwr run` sends to a SuperLink and its SuperNodes: names of what is installed there, and settings."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it when it is imported

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from molora._version import __version__
from molora.atomic import new_folder
from molora.colors import printable
from molora.errors import ConfigError
from molora_training.federated import outcome
from molora_training.federated.flower_client import client_app as make_client_app
from molora_training.federated.flower_client import of_node
from molora_training.federated.flower_server import serve
from molora_training.federated.outcome import Into
from molora_training.federated.place import only_server
from molora_training.federated.progress import closed_line
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import FederateSettings
from molora_training.report import write_report
from molora_training.settings import from_mapping

client_app = make_client_app(of_node)
server_app = ServerApp()

_PROJECT = """[project]
name = "molora-federation"
version = "{version}"
description = "An adapter that learns from many people's conversations"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "molora"

[tool.flwr.app.components]
serverapp = "federation:server_app"
clientapp = "federation:client_app"

[tool.flwr.app.config]
settings = {settings}
"""
_MODULE = '''"""MoLoRA's server and client, as they are installed on each host."""

from molora_training.federated.flower_app import client_app, server_app

__all__ = ["client_app", "server_app"]
'''


def write_app(folder: Path, settings: FederateSettings, into: Into | None) -> None:
    """A folder for `flwr run`.

    Raises:
        ConfigError: there is one already.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already: name another folder.")
    told: dict[str, Any] = {"settings": asdict(settings), "into": None if into is None else asdict(into)}
    told["settings"]["out"] = settings.out.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as made:
        text = json.dumps(json.dumps(told, default=str))  # JSON's strings are TOML's
        (made / "pyproject.toml").write_text(_PROJECT.format(version=__version__, settings=text), encoding="utf-8")
        (made / "federation.py").write_text(_MODULE, encoding="utf-8")


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The server of `flwr run`: all rounds, and what comes of them, on the SuperLink's host."""
    began = time.monotonic()
    told = json.loads(str(context.run_config["settings"]))
    settings = from_mapping(FederateSettings, told["settings"])
    into = from_mapping(Into, told["into"]) if told["into"] is not None else None
    with only_server(settings.out):
        federation = Federation.open(settings)
        losses = serve(grid, context, federation, _log)
        found = outcome.report(federation, losses, "flwr run", time.monotonic() - began)
        if into is None:
            outcome.write(federation, settings.out)
            print(f"{settings.out} holds the adapter.", flush=True)
        else:
            kept = outcome.keep(federation, losses, into, "flwr run", {"privacy": found["privacy"]})
            found["version"] = vars(kept)
            print(f"Version {kept.version} {'serves' if kept.promoted else 'does not serve'}: {kept.why}", flush=True)
        write_report(outcome.plain(found), settings.out.with_name(f"{settings.out.name}.report.json"))


def _log(what: str, told: Any) -> None:
    if what == "closed":
        refused = [printable(f"{client} refused: {why}") for client, why in told["refused"].items()]
        print(closed_line(told), *refused, flush=True)
    elif what not in ("answer", "round"):
        print(what, json.dumps(told, default=str), flush=True)
