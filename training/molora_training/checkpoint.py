"""Training state on disk: trained tensors, AdamW's moments and counters, as safetensors and JSON, never pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from molora.errors import ConfigError


def save_state(
    file: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    counters: Mapping[str, Any],
) -> None:
    """Write one checkpoint file; an interrupted write leaves the former one as it was."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    save_tensors(file, tensors, {"counters": json.dumps(dict(counters))})


def load_state(
    file: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, fingerprint: str
) -> dict[str, Any]:
    """Restore `parameters` and `optimizer` in place and return the counters.

    Raises:
        ConfigError: the file is damaged, or it belongs to a training with another fingerprint.
    """
    try:
        with safe_open(file, "pt") as opened:
            counters = json.loads(opened.metadata()["counters"])
        tensors = load_file(file)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"The checkpoint {file} is damaged ({error}); delete it to start anew.") from error
    if counters["fingerprint"] != fingerprint:
        raise ConfigError(
            f"The checkpoint {file} belongs to a training with other settings or data; "
            f"take those again, or delete {file.parent} (--no-resume does) to start anew."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            prefix = {key: f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if prefix["step"] not in tensors:  # the checkpoint before the first step
                continue
            # AdamW keeps the step count on the CPU, the moments beside the parameter.
            optimizer.state[parameter] = {
                key: tensors[full] if key == "step" else tensors[full].to(parameter.device)
                for key, full in prefix.items()
            }
    return counters


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one step (a new file, then a rename)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, file)


def place_folder(made: Path, target: Path) -> None:
    """Move the finished folder `made` to `target` (same file system), replacing what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        os.replace(made, target)
        return
    with tempfile.TemporaryDirectory(prefix=".old-", dir=target.parent) as aside:
        os.replace(target, Path(aside) / "old")
        try:
            os.replace(made, target)
        except OSError:
            shutil.move(Path(aside) / "old", target)
            raise
