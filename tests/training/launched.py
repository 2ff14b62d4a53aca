"""What tests start in several processes: ``python -m torch.distributed.run ... -m tests.training.launched FILE``.

Each process does the trainings of FILE one after the other; the first one writes the loss of every step to FILE.json.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Training:
    """stop: the step after which it is interrupted. fail: the process that fails after that step; None: all stop."""

    train: Callable[..., dict[str, Any]]
    settings: Any
    stop: int | None = None
    fail: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[float]:
        """The losses of its steps."""
        losses: list[float] = []

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            if step == self.stop and self.fail is None:
                raise KeyboardInterrupt
            if step == self.stop and int(os.environ["RANK"]) == self.fail:
                raise MemoryError("This process has no memory left.")

        try:
            self.train(self.settings, on_step=on_step, **self.more)
        except KeyboardInterrupt:
            assert self.stop is not None
        return losses


def launch(processes: int, trainings: Sequence[Training], folder: Path) -> subprocess.CompletedProcess[str]:
    """Does them in so many processes on the CPU."""
    file = folder / "trainings"
    file.write_bytes(pickle.dumps(list(trainings)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    told = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [*start, "-m", "tests.training.launched", str(file)],
        cwd=folder,
        env={**os.environ, **told, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses_of(folder: Path) -> list[list[float]]:
    """By training of the last launch the losses of its steps."""
    found: list[list[float]] = json.loads((folder / "trainings.json").read_text())
    return found


def main(file: Path) -> None:
    torch.set_num_threads(1)
    found = [training.run() for training in pickle.loads(file.read_bytes())]
    if os.environ["RANK"] == "0":
        file.with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    from tests.training import launched  # the name by which trainings were pickled

    launched.main(Path(sys.argv[1]))
