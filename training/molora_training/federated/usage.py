"""What a piece of work cost the device it ran on."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MOST = 1e18  # seconds or bytes that are believed


@dataclass
class Usage:
    """seconds: by the clock. cpu_seconds: of all threads of the process. peak_bytes: of memory, on the accelerator
    where there is one, else what of the process was resident at most, libraries and base model among it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Filled in on leaving."""
    found = Usage()
    _reset_peak()
    began, cpu = time.monotonic(), time.process_time()
    try:
        yield found
    finally:
        found.seconds = round(time.monotonic() - began, 3)
        found.cpu_seconds = round(time.process_time() - cpu, 3)
        found.peak_bytes = peak_bytes()


def believed(told: Any) -> dict[str, float]:
    """What a client says it cost, as far as it may be that."""
    if not isinstance(told, Mapping):
        return {}
    found = {name: told.get(name) for name in ("seconds", "cpu_seconds", "peak_bytes")}
    return {name: float(one) for name, one in found.items() if isinstance(one, int | float) and 0 <= one < _MOST}


def peak_bytes() -> int:
    """Since the last :func:`measured` began; where the system cannot forget a peak, since the process did."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Linux: the peak is what is resident now
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
