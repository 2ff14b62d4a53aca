"""What ``version.json`` of an adapter store says of a version, and whether files are the ones that it names."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE
from molora.errors import AdapterFormatError, VersionError
from molora.saved import ROUTER

FORMAT = 1
ROUTER_ENTRY = "router.json"
FILES = {"adapter": (CONFIG_FILE, WEIGHTS_FILE), "router": (ROUTER_ENTRY, ROUTER)}
"""What a version may consist of. A router of rules has no weights."""

Kind = Literal["adapter", "router"]
VERSION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class FileMark:
    """A file's size and SHA-256, in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "FileMark":
        with file.open("rb") as source:
            return cls(file.stat().st_size, hashlib.file_digest(source, "sha256").hexdigest())


@dataclass(frozen=True)
class StoredVersion:
    """One version of an adapter or a router. It never changes.

    Args:
        version: 16 hexadecimal digits, the hash of its files: the same content has the same version.
        created: when it was first put, ISO 8601, UTC.
        files: by name. ranks: of an adapter, ascending. base: the base model as an adapter's config names it, or "".
    """

    kind: Kind
    layer: str
    name: str
    version: str
    created: str
    files: Mapping[str, FileMark]
    ranks: tuple[int, ...] = ()
    base: str = ""
    format: int = FORMAT

    @property
    def path(self) -> str:
        return f"{self.layer}/{self.name}/{self.version}"

    @property
    def size_bytes(self) -> int:
        return sum(mark.bytes for mark in self.files.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, path: str) -> "StoredVersion":
        """Args:
            path: "layer/name/version", where it was found.

        Raises:
            VersionError: a newer MoLoRA wrote it. AdapterFormatError: it is damaged, or not about what lies there.
        """
        try:
            found: Any = json.loads(text)
            number = found["format"]
            if isinstance(number, int) and number > FORMAT:
                raise VersionError(f"{path} has format {number}, and this MoLoRA reads {FORMAT}: update it.")
            files = {str(file): FileMark(int(one["bytes"]), str(one["sha256"])) for file, one in found["files"].items()}
            about = cls(**{**found, "files": files, "ranks": tuple(found["ranks"])})
            sound = about.path == path and about.version == content_version(files) and str(about.created)
            if not sound or number != FORMAT or not files or not set(files) <= set(FILES[about.kind]):
                raise ValueError("it is not about what lies there")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, VersionError):
                raise
            raise AdapterFormatError(f"version.json of {path} is damaged ({error}).") from error
        return about

    def wrong(self, folder: Path) -> str:
        """What is not right with the files in ``folder``; "" if they are the ones."""
        for name, mark in self.files.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != mark.bytes:
                return f"{name} is missing or has another size"
            if FileMark.of(file) != mark:
                return f"{name} has another checksum"
        return ""


def content_version(files: Mapping[str, FileMark]) -> str:
    """The version that these files are."""
    lines = "".join(f"{mark.sha256} {name}\n" for name, mark in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
