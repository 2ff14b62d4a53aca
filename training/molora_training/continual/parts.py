"""Parts of a study, each kept as it is finished, so that an interrupted one goes on and several processes share it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molora.atomic import write_text

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


def _kept(file: Path, mark: str) -> Part | None:
    if not file.is_file():
        return None
    found: Part = json.loads(file.read_text(encoding="utf-8"))
    return found if found.pop("mark") == mark else None
