"""Adapters and routers with versions, for any number of users, in a local folder or behind an fsspec URL.

    <url>/<layer>/<name>/current.json               which version serves: the truth, for every machine
    <url>/<layer>/<name>/<version>/                 a PEFT folder, and version.json, written last
    <url>/_routers/<name>/...                       the same of routers: router.json and router.safetensors
    <url>/_pins/<layer>/<name>/pinned.json          stays in the model of every server that has it there

Without current.json the newest version serves. The index, a SQLite file on each machine, only lists names and what is
cached there. Of two who put or remove the same name at once from two machines, the last to write current.json wins.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.core import split_protocol

from molora.adapter import Adapter
from molora.atomic import PARTIAL
from molora.base import cache_dir
from molora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    MoLoRAError,
    RouterError,
    StackError,
    StoreError,
    VersionError,
)
from molora.router import Router
from molora.saved import ROUTER, load, load_router, save_router
from molora.serve.store_index import Index
from molora.serve.store_pins import Pins
from molora.serve.store_places import ABOUT, Folder, Remote
from molora.serve.store_record import FILES, ROUTER_ENTRY, FileMark, Kind, StoredVersion, content_version
from molora.serve.store_shelves import Shelves, path_of
from molora.stack import ROUTERS, check_name
from molora.vocabulary import VocabularyRouter

log = logging.getLogger("molora.serve")

IDLE_S = 600
"""A cached folder stays this long after it was handed out, so that whoever has its path can read it in peace."""

_LEFT_S = 24 * 3600  # after which what lies half done is nobody's work any more


class Found(NamedTuple):
    """What ``reindex`` found."""

    names: int
    versions: int


class AdapterStore:
    """Safe for several threads and processes of one machine, and for several machines.

    Args:
        url: a local folder, or "s3://bucket/prefix" and what else fsspec reaches; settings such as the endpoint come
            from the environment or fsspec's configuration.
        cache: where copies of a remote store are kept; by default in MoLoRA's cache folder.
        index: the SQLite file; by default inside the local folder or the cache. A local folder on a network file
            system needs one elsewhere.
        most_bytes: of one version. most_adapters: names; one more is refused. Other machines' names count after
            ``reindex``.
        cache_bytes: of all copies. Those used in the last ten minutes stay even so.

    Raises:
        ConfigError: fsspec does not know the URL. StoreError: a folder cannot be written to.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        cache: Path | None = None,
        index: Path | None = None,
        most_bytes: int = 1 << 30,
        most_adapters: int = 1_000_000,
        cache_bytes: int = 64 << 30,
    ) -> None:
        protocol, rest = split_protocol(str(url))
        self._place: Folder
        self.url, self._most_bytes, self._most_adapters = str(url), most_bytes, most_adapters
        self._cache_bytes = cache_bytes
        self._remote: Remote | None = None
        if protocol in (None, "file", "local"):
            self._place = Folder(Path(rest).expanduser().resolve())
        else:
            folder = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:16]  # two stores may share a cache
            self._place = self._remote = Remote(self.url, (cache or cache_dir() / "store") / folder)
        self._shelves = Shelves(self.url, self._place)
        self._pins = Pins(self._place)
        self._index = Index(index or self._place.home / ".index.sqlite")
        self._sound: set[str] = set()  # whose files were read through by this object
        self.evictions = 0
        """Copies that this object took away to make room, since it was made."""

    def close(self) -> None:
        self._index.close()

    def put(self, layer: str, name: str, folder: str | Path) -> StoredVersion:
        """Stores a PEFT folder; it is current from then on.

        Raises:
            StackError: a name is none. AdapterError: the folder is no adapter, or is too large: nothing was stored.
            StoreError: the store is full or cannot be reached.
        """
        check_name(layer, "a layer")
        check_name(name, "an adapter")
        source = Path(folder).expanduser()
        if not source.is_dir():
            raise AdapterNotFoundError(f"There is no adapter folder {source}. Give a folder on this machine.")
        files = [source / file for file in FILES["adapter"]]
        if not all(file.is_file() for file in files):
            Adapter.load(source)  # says which is missing
        self._check_size(sum(file.stat().st_size for file in files), f"The adapter at {source}")
        with self._place.writing(), tempfile.TemporaryDirectory(dir=self._place.home, prefix=PARTIAL) as made:
            staged = Path(made)
            for file in files:  # what is checked is the copy: the folder may be written to meanwhile
                shutil.copyfile(file, staged / file.name)
            try:
                adapter = Adapter.load(staged)
            except AdapterError as error:
                raise type(error)(str(error).replace(made, str(source))) from error
            base = adapter.config.get("base_model_name_or_path") or ""
            return self._put("adapter", layer, name, staged, ranks=tuple(adapter.ranks), base=str(base))

    def put_router(self, name: str, router: Router | VocabularyRouter | str | Path) -> StoredVersion:
        """Stores a router, or that of a saved MoLoRA's folder; it is current from then on.

        Raises:
            StackError: the name is none. RouterError: there is no router, or it is too large, or holds NaN.
            StoreError: as for ``put``.
        """
        check_name(name, "a router")
        source = load(router).router if isinstance(router, str | Path) else router
        if source is None:
            raise RouterError(f"The MoLoRA in {router} has no router. Give one that has.")
        with tempfile.TemporaryDirectory(dir=self._place.home, prefix=PARTIAL) as made:
            staged = Path(made)
            if isinstance(source, VocabularyRouter):
                entry: dict[str, Any] = {"kind": "vocabulary", "rules": source.rules, "rows": source.rows}
                entry["vocabulary"] = source.vocabulary
            else:
                entry = save_router(source, staged / ROUTER)
            (staged / ROUTER_ENTRY).write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
            self._check_size(sum(file.stat().st_size for file in staged.iterdir()), f"The router {name!r}", RouterError)
            load_router(staged, entry)
            return self._put("router", ROUTERS, name, staged)

    def get(self, layer: str, name: str, version: str | None = None) -> Path:
        """A local folder of a version, of the current one by default, whose checksums hold.

        Raises:
            AdapterNotFoundError (RouterError of a router): there is none of that name. VersionError: no such version,
            or it was set aside. StoreError: it is damaged, and is set aside now; or the store cannot be reached.
        """
        path = path_of(layer, name, self.current(layer, name) if version is None else version)
        # What current.json names may come from the cache unasked; another version may have been removed elsewhere.
        about = (self._shelves.copied(path) if version is None else None) or self._shelves.about(path)
        folder = self._place.home / path
        if self._remote:
            self._note(self._index.used, path, about.size_bytes)  # before the look: from here on nobody evicts it
        if path not in self._sound or not (folder / ABOUT).is_file():
            self._bring(about, folder)
            self._sound.add(path)
            self._note(self._index.add, layer, name)
            self._note(self._evict)
        return folder

    def finder(self, layer: str) -> Callable[[str], tuple[str, Path]]:
        """For a pool of a layer: the current version of an adapter, and its folder."""

        def find(name: str) -> tuple[str, Path]:
            folder = self.get(layer, name)
            return folder.name, folder

        return find

    def get_router(self, name: str, version: str | None = None) -> Router | VocabularyRouter:
        """Raises as ``get``."""
        folder = self.get(ROUTERS, name, version)
        router = load_router(folder, json.loads((folder / ROUTER_ENTRY).read_text(encoding="utf-8")))
        assert router is not None  # put_router stores no null
        return router

    def versions(self, layer: str, name: str) -> list[StoredVersion]:
        """The oldest first; none where nothing has that name."""
        return self._shelves.versions(layer, name)

    def current(self, layer: str, name: str) -> str:
        """The version that serves.

        Raises:
            AdapterNotFoundError (RouterError of a router): there is none of that name. StoreError: current.json is
                damaged, or the store cannot be reached.
        """
        try:
            return self._shelves.current(layer, name)
        except (AdapterNotFoundError, RouterError):
            self._note(self._index.drop, layer, name)  # removed by another machine
            raise

    def set_current(self, layer: str, name: str, version: str) -> None:
        """Lets a version serve, on every machine from its next ``get`` on.

        Raises:
            VersionError: there is no such version, or it was set aside.
        """
        self._shelves.set_current(layer, name, version)

    def roll_back(self, layer: str, name: str) -> str:
        """Lets the version serve again that was made before the current one; returns it.

        Raises:
            VersionError: there is none.
        """
        return self._shelves.roll_back(layer, name)

    def remove(self, layer: str, name: str) -> None:
        """Takes away all versions, and its pin.

        Raises:
            AdapterNotFoundError (RouterError of a router): there is none of that name.
        """
        self._index.drop(layer, name)
        self._pins.drop(layer, name)
        self._shelves.remove(layer, name)

    def prune(self, layer: str, name: str, keep: int = 2) -> list[str]:
        """Takes away all versions but the newest ``keep`` and the current one; returns those that are gone."""
        return self._shelves.prune(layer, name, keep)

    def pin(self, layer: str, name: str) -> bool:
        """Notes for all servers of the store that an adapter stays in their models; False if that was so before.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        self.current(layer, name)
        return self._pins.add(layer, name)

    def unpin(self, layer: str, name: str) -> bool:
        """It may leave them again; False if it was not pinned."""
        return self._pins.drop(layer, name)

    def pinned(self, layer: str) -> list[str]:
        """Names of a layer's pinned adapters, in order."""
        return self._pins.of(layer)

    def names(self, layer: str, prefix: str = "", limit: int = 1000, after: str = "") -> list[str]:
        """A page of the names that this machine knows, in order: at most ``limit``, behind ``after``, the last one of
        the page before. ``reindex`` adds those that came from other machines and were not asked for here yet."""
        return self._index.names(layer, prefix, after, limit)

    def reindex(self) -> Found:
        """Makes the list of names anew from the store's files, and takes away what killed processes left a day ago."""
        before, found, count = self._index.all(), set(), 0
        for path in self._place.versions():
            layer, name, version = path.split("/")
            with suppress(StackError, VersionError):  # a file of somebody else's
                path_of(layer, name, version)
                found.add((layer, name))
                count += 1
        self._index.change(before - found, found)  # a name that came meanwhile is in neither, and stays
        if self._remote:
            for path in self._remote.copies():
                files = (self._place.home / path).iterdir()
                self._index.used(path, sum(file.stat().st_size for file in files))
        self._place.sweep(_LEFT_S)
        return Found(len(found), count)

    def _put(self, kind: Kind, layer: str, name: str, staged: Path, **facts: Any) -> StoredVersion:
        """Makes the files in ``staged`` the current version."""
        if self._index.count() >= self._most_adapters and not self.versions(layer, name):
            raise StoreError(
                f"{self.url} holds {self._index.count()} adapters, its most: nothing was stored. Remove some, or open "
                f"it with a larger most_adapters."
            )
        files = {file.name: FileMark.of(file) for file in sorted(staged.iterdir())}
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        about = StoredVersion(kind, layer, name, content_version(files), now, files, **facts)
        with self._place.locked():
            there = self._shelves.read(about.path)
            if there is None:
                (staged / ABOUT).write_text(about.to_json(), encoding="utf-8")
                self._place.send(staged, about.path)
            self._shelves.point(layer, name, about.version)
            self._note(self._index.add, layer, name)
        if self._remote and there is None:
            self._note(self._index.used, about.path, about.size_bytes)
            self._note(self._evict)
        return there or about

    def _note(self, change: Callable[..., None], *given: Any) -> None:
        """Changes the index, without which an adapter serves as well: ``reindex`` makes it anew."""
        try:
            change(*given)
        except (StoreError, OSError) as error:
            log.error("%s", error)

    def _bring(self, about: StoredVersion, folder: Path) -> None:
        """Makes sure that the files in ``folder`` are the right ones."""
        self._check_size(about.size_bytes, about.path, RouterError if about.kind == "router" else AdapterFormatError)
        for _ in range(2 if self._remote else 1):  # a transfer may go wrong, another machine may be writing
            there = folder.is_dir()  # before the look: what another process brings meanwhile must stay
            wrong = about.wrong(folder)
            if not wrong and (folder / ABOUT).is_file():
                return
            if self._remote:
                if there:
                    self._remote.forget(about.path)
                self._remote.bring(about.path, {name: mark.bytes for name, mark in about.files.items()})
        if wrong := about.wrong(folder):
            self._shelves.about(about.path)  # it may have been removed meanwhile
            self._shelves.set_aside(about.path, wrong)
            raise StoreError(
                f"{about.path} in {self.url} is damaged: {wrong}. It was set aside and is not served any more: put it "
                f"again, or let another version serve (molora store use)."
            )

    def _evict(self) -> None:
        if self._remote:
            self.evictions += self._index.evict(self._cache_bytes, IDLE_S, self._remote.forget)

    def _check_size(self, found_bytes: int, what: str, error: type[MoLoRAError] = AdapterFormatError) -> None:
        if found_bytes > self._most_bytes:
            raise error(
                f"{what} has {found_bytes} bytes, and this store takes {self._most_bytes}: nothing was read or stored. "
                f"Make it smaller, or open the store with a larger most_bytes."
            )
