"""Numbered versions of the adapters and the router of a saved MoLoRA: what serves, what it came from, the way back.

    <saved>/molora.json                               names what serves: a promotion is one replacement of this file
    <saved>/versions/adapters/<layer>/<name>/<n>/     a PEFT folder and version.json
    <saved>/versions/router/<n>/                      router.safetensors and version.json

A version never changes. One that did not pass its gate is kept to be looked at, and is never served.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from molora.adapter import Adapter
from molora.atomic import new_folder, remove_folder, sweep, write_text
from molora.errors import VersionError
from molora.router import Router
from molora.saved import MANIFEST, ROUTER, VERSIONS, copy_adapter, load_router, read_manifest, router_file, save_router
from molora.selection import router_rows
from molora.stack import Stack, check_name

ABOUT = "version.json"
KEPT = 8  # versions of each that stay, beside what serves and what it came from last
ROW_OF = "with a row for {}"  # why a router has a version: an adapter came with its row
_LOCK = ".molora.lock"


@dataclass(frozen=True)
class Version:
    """One version.

    Args:
        number: from 1, in the order of their making; no number comes twice.
        parent: the version that it was made from.
        created: when, ISO 8601, UTC.
        command: what made it.
        data: what it learnt from, as hashes; no text.
        metrics: what was measured of it.
        passed: whether it may serve. why: what its gate says.
        router: of a router's version its entry in molora.json.
    """

    number: int
    parent: int | None
    created: str
    command: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    passed: bool = True
    why: str = ""
    router: Mapping[str, Any] | None = None


class Versions:
    """The versions of one adapter or of the router of a saved MoLoRA.

    Args:
        saved: its folder.
        layer, name: the adapter; both None: the router.

    Raises:
        StackError: there is no saved MoLoRA, or a name is none.
    """

    def __init__(self, saved: str | Path, layer: str | None = None, name: str | None = None) -> None:
        self.saved = Path(saved).expanduser()
        read_manifest(self.saved)
        if (layer is None) != (name is None):
            raise VersionError("Name a layer and an adapter of it, or neither for the router.")
        self.layer, self.name = layer, name
        if layer is not None and name is not None:
            check_name(layer, "a layer")
            check_name(name, "an adapter")
            self.label, place = f"{layer}/{name}", Path("adapters") / layer / name
        else:
            self.label, place = "the router", Path("router")
        self.place = Path(VERSIONS) / place  # from the saved folder

    def all(self) -> list[Version]:
        """Every version, the oldest first."""
        return [self[number] for number in self._numbers()]

    def __getitem__(self, number: int) -> Version:
        try:
            return Version(**json.loads((self.path(number) / ABOUT).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            known = ", ".join(map(str, self._numbers())) or "none"
            raise VersionError(f"There is no version {number} of {self.label}; there are: {known}.") from error
        except (OSError, ValueError, TypeError) as error:
            raise VersionError(f"Version {number} of {self.label} has a damaged {ABOUT} ({error}).") from error

    def path(self, number: int) -> Path:
        """Its folder."""
        return self._folder / str(number)

    @property
    def current(self) -> int | None:
        """The number that serves; None: what was there before there were versions, or nothing."""
        served = self._served(read_manifest(self.saved))
        if served is None:
            return None
        inside, number = Path(served).parent, Path(served).name
        return int(number) if inside == self.place and number.isdecimal() else None

    def add(
        self,
        source: Path | Router,
        *,
        command: str | None = None,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        passed: bool = True,
        why: str = "",
        parent: int | None = None,
    ) -> Version:
        """Keeps a new version. It does not serve yet.

        Args:
            source: a PEFT folder, or a router.
            command, data, metrics, passed, why: see :class:`Version`.
            parent: what it was made from; None: what serves now.

        Raises:
            AdapterError: the folder is no adapter. VersionError: it is a router for an adapter's versions, or an
                adapter for the router's.
        """
        if isinstance(source, Router) != (self.layer is None):
            raise VersionError(f"Versions of {self.label} are {'routers' if self.layer is None else 'PEFT folders'}.")
        with self._locked():
            self._adopt()
            about = {"command": command, "data": data or {}, "metrics": metrics or {}, "passed": passed, "why": why}
            return self._write(source, parent or self.current or self._first(), about)

    def promote(self, number: int, router: Router | None = None) -> None:
        """Lets a version serve, from the next load on.

        Args:
            number: the version.
            router: of an adapter that the stack does not have yet, a router with a row for it: it becomes a version of
                the router's, and serves from the same moment.

        Raises:
            VersionError: there is none of that number, it did not pass its gate, or the stack has no place for it.
        """
        with self._locked():
            version = self[number]
            if not version.passed:
                raise VersionError(f"Version {number} of {self.label} may not serve: {version.why or 'it failed'}.")
            manifest = read_manifest(self.saved)
            if router is None:
                self._point(manifest, version)
            else:
                self._point({**manifest, "router": None}, version)  # the row comes with it
                routers = Versions(self.saved)
                routers._adopt()
                about = {"why": ROW_OF.format(self.label)}
                routers._point(manifest, routers._write(router, routers.current or routers._first(), about))
            write_text(self.saved / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def rollback(self, to: int | None = None) -> int:
        """Lets an earlier version serve again: ``to``, or the one that what serves was made from.

        Returns:
            Its number.

        Raises:
            VersionError: there is none.
        """
        current = self.current
        if to is None:
            if current is None:
                raise VersionError(f"{self.label} serves as it was saved: there is nothing to go back to.")
            to = self[current].parent
            if to is None:
                raise VersionError(f"Version {current} of {self.label} is the first: there is nothing to go back to.")
        self.promote(to)
        return to

    def collect(self, keep: int = KEPT) -> list[int]:
        """Takes away old versions but the last ``keep``, what serves and its line of parents as far as ``keep``, and
        the first, from which an adapter is made anew when it has to forget.

        Returns:
            The numbers that are gone.
        """
        with self._locked():
            versions = {version.number: version for version in self.all()}
            stay = set(sorted(versions)[-max(1, keep) :]) | {n for n, one in versions.items() if one.parent is None}
            line = self.current
            for _ in range(max(1, keep)):
                if line is None or line not in versions:
                    break
                stay.add(line)
                line = versions[line].parent
            gone = sorted(set(versions) - stay)
            for number in gone:
                remove_folder(self.path(number))
            return gone

    def root(self) -> Version | None:
        """The first version, which was made from no other; None if there is none."""
        return next((version for version in self.all() if version.parent is None), None)

    def drop(self, stay: Iterable[int]) -> list[int]:
        """Takes away every version but ``stay`` and what serves.

        Returns:
            The numbers that are gone.
        """
        with self._locked():
            gone = sorted(set(self._numbers()) - {*stay, self.current})
            for number in gone:
                remove_folder(self.path(number))
            return gone

    def erase(self) -> None:
        """Takes an adapter out of the saved MoLoRA, with all its versions, all that lies beside them, and its row of
        the router. What an interruption left of it is taken away too.

        Raises:
            VersionError: it is the router, or there is nothing of it.
        """
        if self.layer is None or self.name is None:
            raise VersionError("The router cannot be erased.")
        routers = Versions(self.saved)
        with self._locked():
            manifest = read_manifest(self.saved)
            served = self._served(manifest)
            inside = [self._folder, self.saved / "adapters" / self.layer / self.name]
            if served is None and not any(folder.is_dir() for folder in inside):
                raise VersionError(f"There is nothing of {self.label} in {self.saved}.")
            row = f"{self.layer}/{self.name}"
            if served is not None:
                (layer,) = (one for one in manifest["stack"]["layers"] if one["name"] == self.layer)
                del layer["adapters"][self.name]
                if layer["default"] == self.name:
                    layer["default"] = None
                router = load_router(self.saved, manifest["router"])
                if isinstance(router, Router) and row in router.rows:
                    router.remove_row(row)
                    routers._point(manifest, routers._write(router, None, {"why": f"{row} was erased"}))
                elif router is not None and row in router.rows:
                    raise VersionError(f"Rules about words choose {row}: load the model, remove_adapter, and save it.")
                write_text(self.saved / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            if (read_manifest(self.saved)["router"] or {}).get("file", ROUTER) != ROUTER:
                (self.saved / ROUTER).unlink(missing_ok=True)  # it may still know the row
            for version in routers.all():
                if row in (version.router or {}).get("rows", ()):
                    remove_folder(routers.path(version.number))
            for folder in inside:
                if folder.is_dir():
                    remove_folder(folder)

    @property
    def _folder(self) -> Path:
        return self.saved / self.place

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; a process that dies lets go."""
        with FileLock(self.saved / _LOCK):
            sweep(self.saved)
            sweep(self._folder)
            yield

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdecimal())

    def _first(self) -> int | None:
        return 1 if self.path(1).is_dir() else None

    def _adopt(self) -> None:
        """What serves without a number becomes version 1 too, so that there is a way back to it."""
        manifest = read_manifest(self.saved)
        served = self._served(manifest)
        if served is None or self._numbers():
            return
        about: dict[str, Any] = {"why": "as it was saved"}
        if self.layer is None:
            router = load_router(self.saved, manifest["router"])
            if isinstance(router, Router):
                self._write(router, None, about)
        else:
            self._write(self.saved / served, None, about)

    def _write(self, source: Path | Router, parent: int | None, about: Mapping[str, Any]) -> Version:
        number = max(self._numbers(), default=0) + 1
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with new_folder(self.path(number)) as folder:
            entry = None
            if isinstance(source, Router):
                entry = save_router(source, folder / ROUTER)
            else:
                Adapter.load(source)
                copy_adapter(source, folder)
            version = Version(number, parent, created, router=entry, **about)
            (folder / ABOUT).write_text(json.dumps(asdict(version), indent=1) + "\n", encoding="utf-8")
        return version

    def _served(self, manifest: Mapping[str, Any]) -> str | None:
        """The folder that serves, as molora.json names it."""
        if self.layer is None:
            entry = manifest["router"]
            return None if entry is None else Path(router_file(entry)).parent.as_posix()
        for layer in manifest["stack"]["layers"]:
            if layer["name"] == self.layer and self.name in layer["adapters"]:
                return str(layer["adapters"][self.name])
        return None

    def _point(self, manifest: dict[str, Any], version: Version) -> None:
        """Changes what ``manifest`` names."""
        place = (self.place / str(version.number)).as_posix()
        if self.layer is None:
            assert version.router is not None
            rows = router_rows(Stack.from_dict(manifest["stack"], self.saved))
            if sorted(version.router["rows"]) != sorted(rows):
                raise VersionError(
                    f"Version {version.number} of the router is for {', '.join(version.router['rows'])}, and the stack "
                    f"has {', '.join(rows)}."
                )
            manifest["router"] = {**version.router, "file": f"{place}/{ROUTER}"}
            return
        layers = {one["name"]: one for one in manifest["stack"]["layers"]}
        if self.layer not in layers:
            raise VersionError(f"There is no layer {self.layer!r}; the stack has {', '.join(layers)}.")
        layer = layers[self.layer]
        routed = manifest["router"] is not None and not (layer["shared"] or layer.get("keyed"))
        if self.name not in layer["adapters"] and routed:
            raise VersionError(f"The router has no row for {self.label}: add the adapter to the model first.")
        layer["adapters"][self.name] = place
