"""A saved MoLoRA on disk: molora.json, router.safetensors, adapters/<layer>/<name>/, and versions/ of them."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE
from molora.errors import RouterError, StackError
from molora.key_file import KEY_FILE, write_key
from molora.router import Router, RouterConfig
from molora.stack import Stack
from molora.vocabulary import VocabularyRouter

FORMAT = 1
MANIFEST = "molora.json"
ROUTER = "router.safetensors"
ROUTER_METRICS = "router.metrics.json"  # how its router was trained
ADAPTERS = "adapters"
VERSIONS = "versions"
_OWN = (MANIFEST, ROUTER, ROUTER_METRICS, ADAPTERS)
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, KEY_FILE, "README.md", "metrics.json")


class Saved(NamedTuple):
    base: str
    stack: Stack
    router: Router | VocabularyRouter | None


def load(folder: str | Path) -> Saved:
    """Reads a saved MoLoRA from a local folder or the Hub.

    Raises:
        StackError: it is none, or of another format. RouterError: its router is damaged.
    """
    path = _find(folder)
    manifest = read_manifest(path)
    stack = Stack.from_dict(manifest["stack"], path)
    return Saved(manifest["base"]["name"], stack, load_router(path, manifest["router"]))


def read_manifest(path: Path) -> dict[str, Any]:
    """molora.json of a folder.

    Raises:
        StackError: it is not there, or of another format.
    """
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StackError(f"{path} is not a saved MoLoRA: {MANIFEST} is not readable ({error}).") from error
    known = {"format", "base", "stack", "router"}
    if not isinstance(manifest, dict) or set(manifest) != known:
        raise StackError(f"{path / MANIFEST} must have the keys {', '.join(sorted(known))}.")
    base = manifest["base"]
    if not isinstance(base, dict) or not isinstance(base.get("name"), str):
        raise StackError(f"{path / MANIFEST}: base must be {{name: ..., revision: ...}}, not {base!r}.")
    if manifest["format"] != FORMAT:
        raise StackError(f"{path / MANIFEST} has format {manifest['format']!r}; this version reads {FORMAT}.")
    return manifest


def _find(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) or ".." in str(folder):
        raise StackError(f"There is no folder {folder}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StackError(f"There is no folder {folder}, and the Hub could not bring it ({error}).") from error


def router_file(entry: Mapping[str, Any]) -> str:
    """Where a router's weights lie, from the saved folder."""
    file = entry.get("file", ROUTER)
    if not isinstance(file, str) or not re.fullmatch(rf"({VERSIONS}/router/\d+/)?{re.escape(ROUTER)}", file):
        raise RouterError(f"{MANIFEST}: a router's file is {ROUTER} or one of its versions, not {file!r}.")
    return file


def load_router(path: Path, entry: Any) -> Router | VocabularyRouter | None:
    """The router of molora.json's ``entry`` in the folder ``path``.

    Raises:
        RouterError: it is damaged. ConfigError: its settings are.
    """
    if entry is None:
        return None
    kinds = {"vocabulary": {"kind", "rules", "rows", "vocabulary"}, "mlp": {"kind", "config", "rows", "hidden_size"}}
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if kind not in kinds or set(entry) - ({"file"} if kind == "mlp" else set()) != kinds[kind]:
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in kinds.items())
        raise RouterError(
            f"{path / MANIFEST}: the router, of kind {kind!r}, must be null or have the keys of its kind ({known})."
        )
    if kind == "vocabulary":
        return VocabularyRouter(entry["rules"], entry["rows"], entry["vocabulary"])
    router = Router(RouterConfig.from_dict(entry["config"]), entry["rows"], entry["hidden_size"])
    file = path / router_file(entry)
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{file} is missing or damaged ({error}).") from error
    if any(not torch.isfinite(tensor).all() for tensor in weights.values()):
        raise RouterError(f"{file} holds NaN or infinite values.")
    try:
        router.load_state_dict(weights)
    except RuntimeError as error:
        raise RouterError(f"{file} does not fit the settings in {MANIFEST} ({error}).") from error
    return router.eval()


def save(
    folder: str | Path,
    base: str,
    stack: Stack,
    router: Router | VocabularyRouter | None,
    sources: Mapping[str, Path],
    keys: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a saved MoLoRA; one that ``folder`` already holds is replaced, whole or not at all. What else lies there,
    such as ``hypernets/``, stays.

    Args:
        sources: "layer/adapter" -> the PEFT folder that is copied.
        keys: "layer/adapter" -> its key, where it is not that of the folder.

    Raises:
        StackError: ``folder`` holds something else, or versions.
    """
    target = Path(folder)
    if (target / VERSIONS).exists():
        raise StackError(f"{target} holds versions, which would be lost: nothing was written. Choose another folder.")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise StackError(f"{target} exists and is no saved MoLoRA: nothing was written. Choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _write(work / "new", base, stack, router, sources, keys or {})
        if target.exists():
            _keep_others(target, work / "new")
            os.replace(target, work / "old")
        try:
            os.replace(work / "new", target)
        except OSError:
            if (work / "old").exists():
                os.rename(work / "old", target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Copied, so that until the new folder takes its place the old one is as it was."""
    for path in old.iterdir():
        if path.name in _OWN:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _write(
    target: Path, base: str, stack: Stack, router: Router | VocabularyRouter | None, sources: Mapping[str, Path],
    keys: Mapping[str, torch.Tensor],
) -> None:  # fmt: skip
    description = stack.to_dict()
    for layer in description["layers"]:
        for name in layer["adapters"]:
            place = Path(ADAPTERS) / layer["name"] / name
            (target / place).mkdir(parents=True)
            label = f"{layer['name']}/{name}"
            copy_adapter(sources[label], target / place)
            if label in keys:
                write_key(target / place, keys[label])
            layer["adapters"][name] = place.as_posix()
    entry: dict[str, Any] | None = None
    if isinstance(router, VocabularyRouter):
        entry = {"kind": "vocabulary", "rules": router.rules, "rows": router.rows, "vocabulary": router.vocabulary}
    elif router is not None:
        target.mkdir(parents=True, exist_ok=True)
        entry = save_router(router, target / ROUTER)
    manifest = {"format": FORMAT, "base": {"name": base, "revision": None}, "stack": description, "router": entry}
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def copy_adapter(source: Path, target: Path) -> None:
    """The files of a PEFT folder that belong to the adapter."""
    for file in _ADAPTER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def save_router(router: Router, file: Path) -> dict[str, Any]:
    """Writes a router's weights; returns its entry in molora.json."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()}
    save_file(weights, file)
    config = asdict(router.config)
    return {"kind": "mlp", "config": config, "rows": list(router.rows), "hidden_size": router.hidden_size}


def push(write: Callable[[Path], None], repo_id: str, *, private: bool, token: str | None) -> str:
    """Uploads what ``write(folder)`` writes to the Hub; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model")
        return str(api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model"))
