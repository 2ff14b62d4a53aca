"""Packed adapters on their way to their devices before they are needed there, beside what runs there."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from molora.packed import Packed

MOST_BYTES = 1 << 28
"""Of copies that wait on the devices to be put in."""


@dataclass(frozen=True, eq=False)
class _Copy:
    values: torch.Tensor
    whole: torch.cuda.Event | None  # when the copy has ended; None: it has


class Ahead:
    """Copies from pinned memory on a stream of their own: whatever computes does not wait for them. Of more than
    ``most_bytes`` those that were asked for first are forgotten, and copied when they are needed.

    Any thread.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._copies: OrderedDict[Packed, list[_Copy]] = OrderedDict()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Ahead"], tuple[int]]:
        """A copy, as of a model, has nothing under way."""
        return Ahead, (self.most_bytes,)

    def __len__(self) -> int:
        return len(self._copies)

    def start(self, packed: Packed) -> None:
        """Begins to copy an adapter, unless that was done, or it is larger than all room."""
        if not 0 < packed.flat_bytes <= self.most_bytes:
            return
        with self._lock:
            if packed not in self._copies:
                try:
                    self._copies[packed] = [self._copy(flat.values, flat.device) for flat in packed.flats]
                except torch.OutOfMemoryError:  # there may be room when it is needed
                    return
            self._copies.move_to_end(packed)
            while sum(one.flat_bytes for one in self._copies) > self.most_bytes:
                self._copies.popitem(last=False)

    def take(self, packed: Packed) -> list[torch.Tensor]:
        """The values of an adapter's flats, on their devices. What the caller's streams do next waits for them."""
        with self._lock:
            copies = self._copies.pop(packed, None)
        if copies is None:
            return [flat.values.to(flat.device, non_blocking=True) for flat in packed.flats]
        for copy in copies:
            if copy.whole is not None:
                here = torch.cuda.current_stream(copy.values.device)
                here.wait_event(copy.whole)
                copy.values.record_stream(here)  # its memory belongs to the other stream, which must not reuse it yet
        return [copy.values for copy in copies]

    def _copy(self, values: torch.Tensor, device: torch.device) -> _Copy:
        if device.type != "cuda":
            return _Copy(values.to(device), None)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            return _Copy(values.to(device, non_blocking=True), stream.record_event())
