"""Which code multiplies adapters: the kernels on a GPU that Triton serves, torch everywhere else.

MegaBlocks, where it is installed, only if it is asked for.
"""

import warnings
from importlib.util import find_spec

import torch

from molora.errors import BackendError, ConfigError

BACKENDS = ("torch", "triton", "megablocks")
_broken: list[str] = []  # why the kernels are not used any more


def check_backend(name: str | None) -> None:
    """Raises ConfigError where there is no backend ``name`` (None: by the device), BackendError where it is not
    installed."""
    if name not in (None, *BACKENDS):
        known = " or ".join(BACKENDS)
        raise ConfigError(f"There is no backend {name!r}: choose {known}, or leave it to the device.")
    if name == "megablocks":
        from molora_kernels.megablocks import load

        try:
            load()
        except ImportError as error:
            raise BackendError(str(error)) from error


def backend_for(device: torch.device) -> str:
    """Triton for a CUDA GPU of compute capability 8.0 or more (or AMD's ROCm) where it is installed, else torch."""
    if device.type != "cuda" or find_spec("triton") is None or _broken:
        return "torch"
    old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    if old:
        _warn_once(f"{torch.cuda.get_device_name(device)} is older than the kernels' GPUs (8.0)")
    return "torch" if old else "triton"


def failed(error: Exception) -> bool:
    """Whether ``error`` is Triton's, unable to compile a kernel here; from then on torch does the work."""
    if not type(error).__module__.startswith("triton"):
        return False
    _warn_once(f"Triton cannot compile a kernel here ({type(error).__name__}: {error})")
    return True


def broken() -> bool:
    return bool(_broken)


def _warn_once(why: str) -> None:
    if why not in _broken:
        _broken.append(why)
        warnings.warn(f"{why}: adapters are multiplied by plain torch, which is right but slower.", stacklevel=3)
