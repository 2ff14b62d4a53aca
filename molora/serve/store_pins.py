"""Which adapters of a store every server is to keep in its model once they were asked for there."""

import json
from datetime import UTC, datetime

from molora.serve.store_places import Folder
from molora.serve.store_shelves import path_of
from molora.stack import is_name

PINS = "_pins"  # no layer of a stack can have this name
_PINNED = "pinned.json"


class Pins:
    """A file for each: of two machines that pin at once neither undoes what the other does.

    Args:
        place: where the store's files are.
    """

    def __init__(self, place: Folder) -> None:
        self._place = place

    def add(self, layer: str, name: str) -> bool:
        """False if it was there."""
        with self._place.locked():
            if name in self.of(layer):
                return False
            since = datetime.now(UTC).isoformat(timespec="seconds")
            self._place.add(f"{PINS}/{path_of(layer, name)}/{_PINNED}", json.dumps({"since": since}) + "\n")
            return True

    def drop(self, layer: str, name: str) -> bool:
        """False if it was not there."""
        with self._place.locked():
            if name not in self.of(layer):
                return False
            self._place.delete(f"{PINS}/{path_of(layer, name)}")
            return True

    def of(self, layer: str) -> list[str]:
        """Names, in order."""
        return sorted(filter(is_name, self._place.folders(f"{PINS}/{layer}")))  # others are half deleted
