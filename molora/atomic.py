"""Files and folders that are there whole or not at all, also after a crash or a loss of power."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"


def write_text(path: Path, text: str) -> None:
    """Writes a file in place of the one that is there. After an error nothing is left."""
    draft = _draft(path)
    try:
        with draft.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _settle(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; on leaving it becomes ``path``, of which there must be none. After an error nothing is left."""
    draft = _draft(path)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.iterdir():
            _settle(file)
        _settle(draft)
        os.rename(draft, path)
        _settle(path.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Takes a folder away: at once for those who look, and then its files."""
    gone = _draft(path)
    os.rename(path, gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Takes away what interruptions have left in ``folder``. Nobody else may be writing there."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")


def _settle(path: Path) -> None:
    """Waits until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
