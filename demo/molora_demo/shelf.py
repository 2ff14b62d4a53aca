"""What one browser has taught, on disk: a saved MoLoRA of its own, so that versions, roll back and forget are the
product's.

    <home>/<hash of the browser's key and the base>/molora.json    names what serves
                                            .../lessons.json       titles, and how each was made
                                            .../versions/...       as in every saved MoLoRA
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.adapter import WEIGHTS_FILE
from molora.atomic import remove_folder, write_text
from molora.errors import MoLoRAError, VersionError
from molora.saved import FORMAT, MANIFEST, read_manifest
from molora.stack import Stack, StackLayer
from molora.versions import Versions

INDEX = "lessons.json"
SHORTEST_KEY = 16
LONGEST_TITLE = 40
KEPT = 3  # versions of each
_DIGITS = 12  # of an adapter's name: 48 bits of a hash that only the key's owner can make


@dataclass(frozen=True)
class Lesson:
    """One thing that a browser has taught, as it serves.

    Args:
        layer, name: of the adapter in the model; the name says nothing to who does not have the key.
        title: what its owner calls it. how: what it was made of.
        version: that serves. created: when that was made, ISO 8601.
        size: bytes of its weights. seconds: that it took.
    """

    layer: str
    name: str
    title: str
    how: str
    version: int
    created: str
    size: int
    seconds: float | None
    folder: Path

    @property
    def row(self) -> Path:
        """Where its row of the router is kept, if it has one."""
        return row_file(self.folder)


def row_file(folder: Path) -> Path:
    """Beside a version, which never changes."""
    return folder.parent / f"row-{folder.name}.safetensors"


def told_file(folder: Path) -> Path:
    """Beside a version that learnt chats: what they told."""
    return folder.parent / f"told-{folder.name}.jsonl"


def usable(key: object) -> bool:
    """Whether a browser's key is one; a page that has just been opened has none yet."""
    return isinstance(key, str) and len(key) >= SHORTEST_KEY


def checked_title(title: object) -> str:
    """A title in one line.

    Raises:
        MoLoRAError: it is none, or too long.
    """
    found = " ".join(str(title or "").split())
    if not found or len(found) > LONGEST_TITLE or not found.isprintable():
        raise MoLoRAError(f"Give it a name of 1 to {LONGEST_TITLE} characters.")
    return found


class Shelf:
    """One browser's folder. Nothing is written before :meth:`open`.

    Args:
        home: of all browsers' folders.
        key: the browser's.
        base: the model's name of its base. layers: of its stack.
    """

    def __init__(self, home: Path, key: str, base: str, layers: list[StackLayer]) -> None:
        self.home, self.base, self.layers = home, base, layers
        self._key = key
        self.folder = home / hashlib.sha256(f"{key}\n{base}".encode()).hexdigest()[:32]

    def name_of(self, layer: str, title: str) -> str:
        """The adapter's name in the model."""
        secret = "\n".join((self._key, layer, title))
        return f"me-{hashlib.sha256(secret.encode()).hexdigest()[:_DIGITS]}"

    def versions(self, layer: str, name: str) -> Versions:
        return Versions(self.folder, layer, name)

    def open(self) -> None:
        """Makes the folder, for its owner alone, and gives it the layers that the stack has by now."""
        self.home.mkdir(parents=True, exist_ok=True)
        for folder in (self.home, self.folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            os.chmod(folder, 0o700)
        known: dict[str, Any] = {}
        if (self.folder / MANIFEST).exists():
            known = {layer["name"]: layer for layer in read_manifest(self.folder)["stack"]["layers"]}
        missing = [
            StackLayer(one.name, {}, one.top_k, None, one.shared, one.keyed)
            for one in self.layers
            if one.name not in known
        ]
        if missing:
            layers = [*known.values(), *Stack(missing).to_dict()["layers"]]
            base = {"name": self.base, "revision": None}
            manifest = {"format": FORMAT, "base": base, "stack": {"layers": layers}, "router": None}
            write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def lessons(self) -> list[Lesson]:
        """What serves, in the order of its teaching.

        Raises:
            MoLoRAError: the folder is damaged.
        """
        if not (self.folder / MANIFEST).exists():
            return []
        about = self._index()
        found = []
        for layer in read_manifest(self.folder)["stack"]["layers"]:
            for name in layer["adapters"]:
                versions = self.versions(layer["name"], name)
                if (number := versions.current) is None:
                    continue
                folder, own = versions.path(number), about.get(f"{layer['name']}/{name}", {})
                weights = folder / WEIGHTS_FILE
                found.append(
                    Lesson(
                        layer=layer["name"],
                        name=name,
                        title=str(own.get("title", name)),
                        how=str(own.get("how", "unknown")),
                        version=number,
                        created=versions[number].created,
                        size=weights.stat().st_size if weights.is_file() else 0,
                        seconds=own.get("seconds", {}).get(str(number)),
                        folder=folder,
                    )
                )
        order = list(about)
        return sorted(
            found, key=lambda one: order.index(label) if (label := f"{one.layer}/{one.name}") in order else -1
        )

    def find(self, layer: str, name: str) -> Lesson:
        """Raises MoLoRAError: this browser has taught no such thing."""
        for one in self.lessons():
            if (one.layer, one.name) == (layer, name):
                return one
        raise MoLoRAError("That is not among what this browser has taught.")

    def note(self, layer: str, name: str, title: str, how: str, number: int, seconds: float) -> None:
        """Keeps what the table shows of a new version, and takes away what is old."""
        versions, about = self.versions(layer, name), self._index()
        own = about.pop(f"{layer}/{name}", {})
        versions.collect(KEPT)
        stay = {str(one.number) for one in versions.all()}
        times = {**own.get("seconds", {}), str(number): round(seconds, 1)}
        about[f"{layer}/{name}"] = {
            "title": title,
            "how": how,
            "seconds": {one: value for one, value in times.items() if one in stay},
        }
        self._write(about)
        self._sweep(versions)

    def rollback(self, layer: str, name: str) -> int:
        """Lets the version before serve, and takes the newer one away.

        Returns:
            Its number.

        Raises:
            MoLoRAError: there is none.
        """
        lesson, versions = self.find(layer, name), self.versions(layer, name)
        try:
            number = versions.rollback()
        except VersionError:
            raise MoLoRAError(f"“{lesson.title}” has no version before this one. Forget takes it away.") from None
        versions.drop(one.number for one in versions.all() if one.number != lesson.version)
        self._sweep(versions)
        return number

    def drop(self, layer: str, name: str, stay: list[int]) -> None:
        """After an attempt that came to nothing: what was there before stays, and nothing else."""
        versions = self.versions(layer, name)
        if versions.current is None:
            if (self.folder / versions.place).is_dir():
                versions.erase()
        else:
            versions.drop(stay)
            self._sweep(versions)
        self._tidy()

    def forget(self, layer: str, name: str) -> None:
        """Takes it away with all its files."""
        self.versions(layer, name).erase()
        about = self._index()
        about.pop(f"{layer}/{name}", None)
        self._write(about)
        self._tidy()

    def forget_all(self) -> None:
        """Takes the whole folder away, damaged or not."""
        if self.folder.is_dir():
            remove_folder(self.folder)

    @property
    def used(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def _tidy(self) -> None:
        """An empty shelf is no shelf."""
        if not self.lessons() and not any((self.folder / "versions").rglob(WEIGHTS_FILE)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self, versions: Versions) -> None:
        """What lies beside a version goes with it."""
        folders = [versions.path(one.number) for one in versions.all()]
        stay = {of(folder) for folder in folders for of in (row_file, told_file)}
        for pattern in ("row-*.safetensors", "told-*.jsonl"):
            for file in (self.folder / versions.place).glob(pattern):
                if file not in stay:
                    file.unlink(missing_ok=True)

    def _index(self) -> dict[str, Any]:
        """By label; a damaged file costs the titles and no more."""
        try:
            found = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            return {str(label): dict(own) for label, own in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, about: Mapping[str, Any]) -> None:
        write_text(self.folder / INDEX, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
