"""Adapters by where they lie: PEFT folders, repositories of the Hub, and what a compressed store holds."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from molora.adapter import Adapter, SharedWeights
from molora.compose.manifest import MANIFEST
from molora.compose.parts import CORES, SUFFIX
from molora.compose.store import CompressedStore
from molora.factors import of_adapter, write_factors


def load_adapter(path: str | Path) -> Adapter:
    """A PEFT folder, a Hub id, or <store>/cores/<name>.safetensors, which stays in its compressed form.

    Raises:
        AdapterError: see :meth:`Adapter.load` and :meth:`CompressedStore.adapter`.
    """
    place = Path(path)
    if place.suffix == SUFFIX and place.parent.name == CORES:
        folder = place.parent.parent
        file = folder / MANIFEST
        return _store(folder, file.stat().st_mtime_ns if file.is_file() else 0).adapter(place.stem)
    return Adapter.load(path)


@contextmanager
def as_folders(adapters: Mapping[str, Adapter], base: str) -> Iterator[dict[str, Path]]:
    """Each adapter's PEFT folder; one from a compressed store has one as long as this lasts, in its cores' dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for number, (label, adapter) in enumerate(adapters.items()):
            found[label] = adapter.path
            if not adapter.path.is_dir():
                found[label] = Path(scratch) / str(number)
                kinds = [own.a.dtype for own in adapter.modules.values() if isinstance(own, SharedWeights)]
                write_factors(found[label], of_adapter(adapter), base, {"made_from": "a compressed store"}, kinds[0])
        yield found


@lru_cache(maxsize=8)
def _store(folder: Path, changed: int) -> CompressedStore:
    """Read once for the many adapters that a stack takes from it."""
    return CompressedStore.load(folder)
