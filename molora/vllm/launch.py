"""``molora serve --engine vllm``: vLLM's own server, in which the stack is the model "stack" beside the base."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from molora.base import base_folder, cache_dir
from molora.errors import BackendError, ConfigError
from molora.vllm.export import export
from molora.vllm.folder import read_manifest, reads_hidden

KEY = "VLLM_API_KEY"  # vLLM's server takes its key from there


def launch(
    model: str, *, host: str, port: int, rows: int, longest: int, dtype: str, tensor_parallel: int, ray: bool
) -> NoReturn:
    """Exports the saved MoLoRA and becomes vLLM's server.

    Args:
        model: a folder.
        host, port, rows, longest, dtype: as of ``molora serve``.
        tensor_parallel: GPUs that each layer is spread over.
        ray: on the machines of a Ray cluster.

    Raises:
        BackendError: vLLM is not installed here. Others: as of :func:`molora.vllm.export.export`.
    """
    if find_spec("vllm") is None:
        raise BackendError('vLLM is not installed in this environment: pip install "molora[vllm]".')
    made = export(model, cache_dir() / "exported")
    told = arguments(made, host, port, rows, longest, dtype, tensor_parallel, ray)
    print(f'Ask for the model "stack", or "base"; {made} is what vLLM serves.', flush=True)
    os.execve(sys.executable, [sys.executable, *told], {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"})


def arguments(
    exported: Path, host: str, port: int, rows: int, longest: int, dtype: str, tensor_parallel: int, ray: bool
) -> list[str]:
    """Of Python, for vLLM's server."""
    manifest = read_manifest(exported)
    found = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(base_folder(str(manifest["base"])))]
    found += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(manifest["rank"])]
    found += ["--lora-modules", f"stack={exported}", "--host", host, "--port", str(port), "--dtype", dtype]
    found += ["--max-num-seqs", str(rows), "--max-model-len", str(longest)]
    if reads_hidden(manifest):
        found += ["--enforce-eager"]
    if tensor_parallel > 1:
        found += ["--tensor-parallel-size", str(tensor_parallel)]
    if ray:
        found += ["--distributed-executor-backend", "ray"]
    return found


def check_options(open_to_others: bool, **own: object) -> None:
    """Raises ConfigError: options of our own engine were given (those that are not None), or other machines are let in
    without a key."""
    given = [f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None]
    if given:
        raise ConfigError(f"vLLM's server has no {', '.join(given)}: leave out, or serve with MoLoRA's own engine.")
    if open_to_others and not os.environ.get(KEY):
        raise ConfigError(f"Other machines are let in, and there is no key: set {KEY}, or listen on 127.0.0.1.")
