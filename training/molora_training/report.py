"""What the tables of results have in common: the machine, the lines that must hold, a file written whole."""

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molora import provenance


def heading(command: str, data: str) -> dict[str, Any]:
    """The first keys of a report: how, where, when and on what it was measured."""
    return {
        "command": command,
        "commit": provenance.commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "seed": 0,
        "data": data,
    }


def machine() -> str:
    """What measures here."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def line(name: str, value: float, bar: float, better: str, note: str = "") -> dict[str, Any]:
    """What had to be reached, "higher" or "lower" than ``bar``, and whether it is."""
    holds = value >= bar if better == "higher" else value <= bar
    return {"name": name, "value": value, "bar": bar, "better": better, "holds": holds, "note": note}


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Writes ``out``, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.partial")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, out)
