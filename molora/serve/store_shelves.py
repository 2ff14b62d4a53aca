"""Which versions an adapter store holds, and which of them serves."""

import json

from molora.errors import AdapterFormatError, AdapterNotFoundError, MoLoRAError, RouterError, StoreError, VersionError
from molora.serve.store_places import ABOUT, Folder, Remote
from molora.serve.store_record import VERSION, StoredVersion
from molora.stack import ROUTERS, check_name

_CURRENT = "current.json"
_DAMAGED = "damaged.json"


def path_of(layer: str, name: str, version: str | None = None) -> str:
    """In the store. Raises StackError and VersionError for what is no plain name."""
    if layer != ROUTERS:
        check_name(layer, "a layer")
    check_name(name, "an adapter")
    if version is None:
        return f"{layer}/{name}"
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise VersionError(f"{version!r} is no version: it has 16 hexadecimal digits, as versions() lists them.")
    return f"{layer}/{name}/{version}"


class Shelves:
    """The records of a store: every answer comes from its files, none is remembered.

    Args:
        url: of the store, for messages. place: where its files are.
    """

    def __init__(self, url: str, place: Folder) -> None:
        self._url, self._place = url, place

    def versions(self, layer: str, name: str) -> list[StoredVersion]:
        """The oldest first; none where nothing has that name."""
        paths = [path_of(layer, name, version) for version in self.folders(layer, name)]
        found = [about for about in map(self.read, paths) if about is not None]
        return sorted(found, key=lambda about: (about.created, about.version))

    def current(self, layer: str, name: str) -> str:
        """The version that serves.

        Raises:
            AdapterNotFoundError (RouterError of a router): there is none of that name. StoreError: current.json is
            damaged, or the store cannot be reached.
        """
        path = f"{path_of(layer, name)}/{_CURRENT}"
        try:
            version = json.loads(self._place.read(path))["version"]
        except FileNotFoundError:
            found = self.versions(layer, name)
            if found:
                return found[-1].version
            raise self.missing(layer, name) from None
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"{path} in {self._url} is damaged ({error}). Call set_current to write it anew."
            ) from error
        return version

    def set_current(self, layer: str, name: str, version: str) -> None:
        with self._place.locked():
            self.about(path_of(layer, name, version))
            self.point(layer, name, version)

    def roll_back(self, layer: str, name: str) -> str:
        with self._place.locked():
            current, found = self.current(layer, name), [about.version for about in self.versions(layer, name)]
            earlier = found[: found.index(current)] if current in found else found
            if not earlier:
                raise VersionError(f"{layer}/{name} has no version before {current}: there is nothing to go back to.")
            self.point(layer, name, earlier[-1])
            return earlier[-1]

    def remove(self, layer: str, name: str) -> None:
        with self._place.locked():
            found = self.folders(layer, name)
            if not found:
                raise self.missing(layer, name)
            for version in found:
                self.delete(path_of(layer, name, version))
            self._place.delete(path_of(layer, name))

    def prune(self, layer: str, name: str, keep: int) -> list[str]:
        with self._place.locked():
            found = [about.version for about in self.versions(layer, name)]
            stay = {*found[max(0, len(found) - keep) :], self.current(layer, name)}
            gone = [version for version in found if version not in stay]
            for version in gone:
                self.delete(path_of(layer, name, version))
            return gone

    def folders(self, layer: str, name: str) -> list[str]:
        return [found for found in self._place.folders(path_of(layer, name)) if VERSION.fullmatch(found)]

    def read(self, path: str) -> StoredVersion | None:
        """None where there is no such version; it is set aside if its version.json is damaged."""
        try:
            return StoredVersion.from_json(self._place.read(f"{path}/{ABOUT}"), path)
        except FileNotFoundError:
            return None
        except AdapterFormatError as error:
            self.set_aside(path, str(error))
            return None

    def copied(self, path: str) -> StoredVersion | None:
        """As the copy on this machine says."""
        try:
            return StoredVersion.from_json((self._place.home / path / ABOUT).read_bytes(), path)
        except (FileNotFoundError, AdapterFormatError):
            return None

    def about(self, path: str) -> StoredVersion:
        """Raises VersionError where there is no such version."""
        about = self.read(path)
        if about is not None:
            return about
        layer, name, version = path.split("/")
        known = ", ".join(one.version for one in self.versions(layer, name)) or "none"
        try:
            self._place.read(f"{path}/{_DAMAGED}")
        except FileNotFoundError:
            raise VersionError(f"There is no version {version} of {layer}/{name}; there are: {known}.") from None
        raise VersionError(
            f"Version {version} of {layer}/{name} was damaged and set aside: put it again, or let one of the "
            f"others serve (molora store use): {known}."
        )

    def set_aside(self, path: str, why: str) -> None:
        """Its files stay, to be looked at."""
        with self._place.locked():
            self._place.write(f"{path}/{_DAMAGED}", json.dumps({"why": why}) + "\n")
            self._place.delete(f"{path}/{ABOUT}")
        if isinstance(self._place, Remote):
            self._place.forget(path)

    def point(self, layer: str, name: str, version: str) -> None:
        self._place.write(f"{layer}/{name}/{_CURRENT}", json.dumps({"version": version}) + "\n")

    def delete(self, path: str) -> None:
        self._place.delete(f"{path}/{ABOUT}")  # first: what is half gone must not be seen
        self._place.delete(path)

    def missing(self, layer: str, name: str) -> MoLoRAError:
        if layer == ROUTERS:
            return RouterError(f"There is no router {name!r} in {self._url}. Put one first.")
        return AdapterNotFoundError(f"There is no adapter {layer}/{name} in {self._url}. Put one first.")
