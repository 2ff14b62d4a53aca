"""Where an adapter store's files are: a local folder, or anything that fsspec reaches, with copies on this machine.

Paths are of the store, "layer/name/version/file". Of a version, ``version.json`` is written last and removed first:
without it there is no such version.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import fsspec
from filelock import FileLock

from molora.atomic import PARTIAL, new_folder, remove_folder, write_text
from molora.errors import ConfigError, StoreError

ABOUT = "version.json"
_LOCK = ".molora.lock"


class Folder:
    """A store that is a local folder: what it hands out are its own files. One lock orders its writers."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock = FileLock(home / _LOCK)  # one object: a thread that has it may take it again
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{home} cannot be made ({error}). Choose a folder that may be written to.") from error

    def locked(self) -> AbstractContextManager[object]:
        return self._lock

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What a disk says that is full, or may not be written to, is a StoreError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self.home} cannot be written to ({error}). Make room, or see who may write.") from error

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError where there is none."""
        return (self.home / path).read_bytes()

    def write(self, path: str, text: str) -> None:
        """Replaces a file at once."""
        with self.writing():
            write_text(self.home / path, text)

    def add(self, path: str, text: str) -> None:
        """As ``write``, and makes the folders that the file is to be in."""
        with self.writing():
            (self.home / path).parent.mkdir(parents=True, exist_ok=True)
        self.write(path, text)

    def delete(self, path: str) -> None:
        """A file or a folder, if it is there."""
        place = self.home / path
        with self.writing(), suppress(FileNotFoundError):
            if place.is_dir():
                remove_folder(place)
            else:
                place.unlink()

    def folders(self, path: str) -> list[str]:
        """The names of the folders in a folder."""
        with suppress(FileNotFoundError):
            return [entry.name for entry in (self.home / path).iterdir() if entry.is_dir()]
        return []

    def versions(self) -> Iterator[str]:
        """Every "layer/name/version" that has been written whole."""
        for layer in self.folders(""):
            for name in self.folders(layer):
                for version in self.folders(f"{layer}/{name}"):
                    if (self.home / layer / name / version / ABOUT).is_file():
                        yield f"{layer}/{name}/{version}"

    def sweep(self, older_s: float) -> None:
        """Takes away what interruptions have left here longer ago than that."""
        for folder, folders, files in os.walk(self.home):
            for name in [name for name in (*folders, *files) if name.startswith(PARTIAL)]:
                left = Path(folder, name)
                with suppress(FileNotFoundError):  # whoever made it is done with it
                    if left.stat().st_mtime > time.time() - older_s:
                        continue
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()
            folders[:] = [name for name in folders if not name.startswith(PARTIAL)]

    def send(self, staged: Path, path: str) -> None:
        """Makes the files of ``staged`` a version; then they are at ``home / path`` too."""
        with self.writing():
            if (self.home / path).is_dir():  # what was set aside
                remove_folder(self.home / path)
            settle(staged, self.home / path)

    def bring(self, path: str, files: Mapping[str, int]) -> None:
        """Makes a new copy at ``home / path``, of which ``files`` gives the bytes. Here there is none to make."""


class Remote(Folder):
    """A store behind an fsspec URL; ``home`` is its cache on this machine."""

    def __init__(self, url: str, home: Path) -> None:
        super().__init__(home)
        self.url = url
        try:  # listings of what other machines write must not be remembered
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} is no place that fsspec knows here ({error}). Install what it names.") from error

    def locked(self) -> AbstractContextManager[object]:
        return nullcontext()  # no lock reaches other machines: the order of writing has to be enough

    def read(self, path: str) -> bytes:
        with self._reaching():
            return self._files.cat_file(self._at(path))

    def write(self, path: str, text: str) -> None:
        with self._reaching():
            self._files.pipe_file(self._at(path), text.encode())

    def add(self, path: str, text: str) -> None:
        self.write(path, text)

    def delete(self, path: str) -> None:
        with self._reaching(), suppress(FileNotFoundError):
            self._files.rm(self._at(path), recursive=True)
        super().delete(path)

    def folders(self, path: str) -> list[str]:
        with self._reaching(), suppress(FileNotFoundError):
            found = self._files.ls(self._at(path), detail=True)
            return [one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory"]
        return []

    def versions(self) -> Iterator[str]:
        with self._reaching():
            for path in self._files.find(self._root):
                parts = path.rsplit("/", 4)
                if parts[-1] == ABOUT:
                    yield "/".join(parts[1:4])

    def copies(self) -> Iterator[str]:
        """Every "layer/name/version" in the cache."""
        return Folder(self.home).versions()

    def forget(self, path: str) -> None:
        """Takes the copy of a version away."""
        with suppress(FileNotFoundError):
            remove_folder(self.home / path)

    def send(self, staged: Path, path: str) -> None:
        with self._reaching():
            for file in sorted(staged.iterdir(), key=lambda file: file.name == ABOUT):  # that one last
                self._files.put_file(str(file), self._at(f"{path}/{file.name}"))
        with self.writing():
            settle(staged, self.home / path)

    def bring(self, path: str, files: Mapping[str, int]) -> None:
        with self._reaching(), suppress(FileNotFoundError), _made(self.home / path) as draft:
            for file in (*files, ABOUT):
                place = self._at(f"{path}/{file}")
                if file == ABOUT or self._files.info(place)["size"] == files[file]:  # else it is not worth the way
                    self._files.get_file(place, str(draft / file))

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Every client has errors of its own, of no common kind."""
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            raise StoreError(
                f"The store {self.url} does not answer ({type(error).__name__}: {error}). Check the network, the "
                f"address and the credentials, and try again: nothing was changed that others see."
            ) from error


def settle(staged: Path, target: Path) -> None:
    """Moves the files of ``staged`` to a new folder, there whole or not at all."""
    with _made(target) as draft:
        for file in staged.iterdir():
            shutil.move(file, draft / file.name)


@contextmanager
def _made(target: Path) -> Iterator[Path]:
    """As ``new_folder``; where another process was faster with the same files, its folder stays."""
    try:
        with new_folder(target) as draft:
            yield draft
    except OSError:
        if not target.is_dir():
            raise
