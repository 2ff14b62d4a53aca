"""Adapters of a layer that are live only while they are asked for: a store's hundred thousand in the room of a few.

Three tiers: live in the model (slots that the kernels read), in the host's memory as they were read, and wherever
``find`` finds them. A version that is asked for is never replaced while it acts: a newer one has its own slot.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from molora.checks import check_fits
from molora.errors import BusyError, StackError
from molora.loading import load_adapter
from molora.model import MoLoRAModel
from molora.packed import Packed

Find = Callable[[str], tuple[str, Path]]
"""name -> its version now, and a PEFT folder that holds it; AdapterNotFoundError: there is none."""


@dataclass(frozen=True, eq=False)
class Read:
    """A version of an adapter in the host's memory, checked against the base and made ready for it."""

    name: str
    version: str
    packed: Packed

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version


@dataclass(frozen=True)
class PoolStats:
    """What the pool holds, and how its adapters were found since the start.

    live_hits: requests' adapters that were in the model. host_hits: that were not, and were put in from the host's
    memory. reads: that had to be brought there first, once for all who waited. evictions, host_evictions: that left the
    model and the host's memory, to make room.
    """

    live: int
    pinned: int
    most: int
    host_bytes: int
    live_hits: int
    host_hits: int
    reads: int
    evictions: int
    host_evictions: int


@dataclass(eq=False)
class _Live:
    slot: str  # its name in the stack, which no caller ever sees
    leases: int = 0
    found: str = ""  # where the last lease found it


class Pool:
    """The adapters of a shared layer.

    Args:
        model: whose layer it is. The layer's own adapters stay, and are found first.
        layer: with ``shared``: no router's row comes and goes with them.
        find: where they are; called from several threads.
        most: adapters that are live at once.
        host_bytes: of what was read and is kept for the next time.

    Raises:
        StackError: there is no such layer, or it is not shared.
    """

    def __init__(
        self, model: MoLoRAModel, layer: str, find: Find, *, most: int = 64, host_bytes: int = 1 << 30
    ) -> None:
        if not model.stack[layer].shared:
            raise StackError(f"Layer {layer!r} is not shared: its adapters have rows of their own in the router.")
        self.model, self.layer, self.find, self.most, self.host_bytes = model, layer, find, most, host_bytes
        self._live: OrderedDict[tuple[str, str], _Live] = OrderedDict()  # least recently used first
        self._names: dict[str, str] = {}  # slot's name -> adapter's
        self._host: OrderedDict[tuple[str, str], Read] = OrderedDict()
        self._held = 0  # bytes in _host
        self._coming: dict[tuple[str, str], Future[Read]] = {}
        self._pinned: dict[str, str] = {}  # name -> the version of it that stays live
        self.staying: frozenset[str] = frozenset()
        """Names that are pinned by whoever shares the store: see :meth:`keep`."""
        self._made, self._prefix = 0, secrets.token_hex(8)  # nobody can name or guess a slot
        self.leases = 0
        """Of all adapters."""
        self._lock = threading.Lock()
        self._counts = {"live": 0, "host": 0, "read": 0, "evicted": 0, "dropped": 0}  # in the order of PoolStats

    def owns(self, name: str) -> bool:
        """Whether a name is looked for here rather than among the layer's own adapters."""
        return name in self._names or name not in self.model.stack[self.layer].adapters  # a slot's is no adapter's

    def read(self, name: str) -> Read:
        """Brings an adapter's present version into the host's memory. Any thread; it may take as long as the store.

        Raises:
            AdapterNotFoundError: there is none. AdapterError, StoreError: it cannot be used or reached.
        """
        version, folder = self.find(name)
        key = (name, version)
        with self._lock:
            if (found := self._host.get(key)) is not None:
                self._host.move_to_end(key)
                return found
            coming = self._coming.get(key)
            if coming is None:
                self._coming[key] = Future()
        if coming is not None:  # another thread reads it
            return coming.result()
        return self._read(key, folder)

    def _read(self, key: tuple[str, str], folder: Path) -> Read:
        try:
            adapter = load_adapter(folder)
            check_fits(adapter, self.model.base, str(self.model.base_name), self.model.adapted.backend)
            packed = self.model.adapted.pack(adapter)
        except Exception as error:
            with self._lock:
                self._coming.pop(key).set_exception(error)
            raise
        read = Read(*key, packed)
        with self._lock:
            self._counts["read"] += 1
            self._host[key] = read
            self._held += packed.nbytes
            while self._held > self.host_bytes and len(self._host) > 1:
                self._held -= self._host.popitem(last=False)[1].packed.nbytes
                self._counts["dropped"] += 1
            self._coming.pop(key).set_result(read)
        return read

    def fetch(self, read: Read) -> None:
        """Starts its way to the device, so that it is there when its request's turn comes. Any thread."""
        if read.key not in self._live:
            self.model.adapted.fetch(read.packed)

    # What follows is the engine's thread's alone.

    def lease(self, read: Read) -> str | None:
        """Makes an adapter live until :meth:`release`; returns its name in the stack, None while there is no room."""
        at = "live" if read.key in self._live else "host"
        live = self._enter(read)
        if live is None:
            return None
        live.found = at
        self._counts[at] += 1
        live.leases += 1
        self.leases += 1
        return live.slot

    def release(self, read: Read) -> None:
        """Nothing of this request needs it any more; it stays until its room is needed."""
        self._live[read.key].leases -= 1
        self.leases -= 1

    def take_back(self, read: Read) -> None:
        """As :meth:`release`, of the lease before: its request waits on, and is counted when it begins."""
        self._counts[self._live[read.key].found] -= 1
        self.release(read)

    def pin(self, read: Read) -> None:
        """Keeps an adapter live whether or not it is asked for, and each newer version once that is asked for.

        Raises:
            StackError: as many are pinned as leave room for one other. BusyError: others use all room now.
        """
        if read.name not in self._pinned and not self._may_pin():
            raise StackError(
                f"{len(self._pinned)} adapters of {self.layer!r} are pinned, of {self.most} that can be live: unpin "
                "one, or serve with more of them live."
            )
        if self._enter(read) is None:
            raise BusyError(f"All {self.most} live adapters of {self.layer!r} are in use. Ask again.", 1.0)
        self._pinned[read.name] = read.version

    def unpin(self, name: str) -> bool:
        """Lets it go like others; False if it was not pinned."""
        self.staying -= {name}
        return self._pinned.pop(name, None) is not None

    def keep(self, names: frozenset[str]) -> None:
        """Pins these adapters, those that are not live once they are asked for, as far as one place stays free; and
        lets all others go."""
        self.staying = names
        for name in self._pinned.keys() - names:
            del self._pinned[name]
        for name, version in reversed(self._live):  # of several versions the one that was used last
            if name in names and name not in self._pinned and self._may_pin():
                self._pinned[name] = version

    def _enter(self, read: Read) -> _Live | None:
        """Its place among the live ones; None while there is no room."""
        live = self._live.get(read.key)
        if live is None:
            if len(self._live) >= self.most and not self._evict():
                return None
            live = _Live(f"{self._prefix}-{self._made}")
            self._made += 1
            self.model.add_adapter(self.layer, live.slot, read.packed)
            self._live[read.key] = live
            self._names[live.slot] = read.name
        self._live.move_to_end(read.key)
        if read.name in self._pinned or (read.name in self.staying and self._may_pin()):
            self._pinned[read.name] = read.version
        return live

    def _may_pin(self) -> bool:
        """Whether one more leaves a place for all others."""
        return len(self._pinned) + 1 < self.most

    @property
    def pinned(self) -> list[str]:
        """Names, in order; from any thread."""
        return sorted(self._pinned.copy())

    def shown(self, slot: str) -> str:
        """The adapter's name, by its name in the stack."""
        return self._names.get(slot, slot)

    def stats(self) -> PoolStats:
        """Counts; from any thread."""
        with self._lock:
            live, pinned = len(self._live), len(self._pinned)
            return PoolStats(live, pinned, self.most, self._held, *self._counts.values())

    def _evict(self) -> bool:
        """Takes out the one that was not used for longest; False if all are in use or pinned."""
        for key, live in self._live.items():
            if not live.leases and self._pinned.get(key[0]) != key[1]:
                self.model.remove_adapter(self.layer, live.slot)
                del self._live[key], self._names[live.slot]
                self._counts["evicted"] += 1
                return True
        return False
