"""Parts of a study, each kept as it is finished, so that an interrupted one goes on and several processes share it."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from molora.atomic import write_text
from molora_training.checkpoint import save_tensors

Part = dict[str, Any]


def finished(
    work: Path, names: Sequence[str], mark: str, share: tuple[int, int], make: Callable[[int], Part]
) -> list[Part] | None:
    """Makes the parts of a share that are not there yet.

    Args:
        work: where they lie, a JSON file each.
        names: of all parts, each once, as files are named.
        mark: changes with anything that a part depends on.
        share: (i, n): of n processes the i-th, which makes every n-th part.
        make: gives the part of an index.

    Returns:
        All parts, or None while some are missing.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"{name}.json" for name in names]
    for index, file in enumerate(files):
        if index % share[1] == share[0] and _kept(file, mark) is None:
            write_text(file, json.dumps({"mark": mark, **make(index)}, indent=1) + "\n")
    kept = [_kept(file, mark) for file in files]
    found = [one for one in kept if one is not None]
    return found if len(found) == len(kept) else None


def file_name(name: str) -> str:
    """A part's name as files are named: small letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def mark_of(record: object, *paths: Path) -> str:
    """Changes with the record, which JSON can hold, and with what the files of the paths say, wherever they lie."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    said = hashlib.file_digest(opened, "sha256").digest()
                digest.update(str(file.relative_to(path)).encode() + said)
    return digest.hexdigest()


def keep_tensors(file: Path, mark: str, tensors: Mapping[str, Tensor], about: Part) -> None:
    """Keeps what parts are made with, and what is to be said of it, in place of what was kept before."""
    save_tensors(file, tensors, {"mark": mark, "about": json.dumps(about)})


def kept_tensors(file: Path, mark: str) -> tuple[dict[str, Tensor], Part] | None:
    """What :func:`keep_tensors` kept; None where that is nothing, or has another mark."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
        if about.get("mark") != mark:
            return None
        return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(about["about"])


def drop_tensors(work: Path) -> None:
    """Takes away what parts were made with, once all are made."""
    for file in work.glob("*.safetensors*"):
        file.unlink()


def _kept(file: Path, mark: str) -> Part | None:
    if not file.is_file():
        return None
    found: Part = json.loads(file.read_text(encoding="utf-8"))
    return found if found.pop("mark") == mark else None
