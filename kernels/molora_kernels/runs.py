"""Which of a slice's pages are whose: slots hold runs of them, and the rest is free."""

from bisect import bisect
from collections.abc import Hashable
from hashlib import blake2b

Run = tuple[int, int]
"""First page, and how many."""


class Runs:
    """The runs of one slice. What each costs does not grow with how many slots hold one.

    of: slot -> its run. names: slot -> the name under which it shares its run with others. digest: 128 bits, equal for
    slices of the same number whose slots hold the same runs.
    """

    def __init__(self, number: int, pages: int) -> None:
        self.of: dict[int, Run] = {}
        self.names: dict[int, Hashable] = {}
        self.digest = 0
        self._shared: dict[Hashable, tuple[Run, int]] = {}  # by name, and how many slots hold it
        self._number = number
        self._free: list[Run] = [(0, pages)]  # in order, none next to another

    def fit(self, need: int, slot: int) -> int | None:
        """The first page of the first free run that is long enough once this slot's own is free, too."""
        own = self.of.get(slot)
        alone = own is not None and (slot not in self.names or self._shared[self.names[slot]][1] == 1)
        free = _with(self._free, own) if own is not None and alone else self._free
        return next((first for first, count in free if count >= need), None)

    def shared(self, name: Hashable | None) -> Run | None:
        """The run that is held under a name."""
        return self._shared[name][0] if name is not None and name in self._shared else None

    def give(self, slot: int) -> Run | None:
        """Takes its run from a slot, if it has one; free is what no other slot holds."""
        run = self.of.pop(slot, None)
        if run is None:
            return None
        self._count(slot, run, -1)
        holders = 1
        if slot in self.names:
            name = self.names.pop(slot)
            holders = self._shared.pop(name)[1]
            if holders > 1:
                self._shared[name] = (run, holders - 1)
        if holders == 1:
            self._free = _with(self._free, run)
        return run

    def take(self, slot: int, run: Run, name: Hashable | None = None) -> None:
        """Lets a slot, which has none, hold a run that is free, or that others hold under this name."""
        self.of[slot] = run
        self._count(slot, run, 1)
        if name is not None:
            self.names[slot] = name
            _, holders = self._shared.get(name, (run, 0))
            self._shared[name] = (run, holders + 1)
            if holders:
                return
        first, count = run
        place = bisect(self._free, (first, float("inf"))) - 1
        start, free = self._free[place]
        left, right = (start, first - start), (first + count, start + free - first - count)
        self._free[place : place + 1] = [one for one in (left, right) if one[1]]

    def _count(self, slot: int, run: Run, sign: int) -> None:
        """A sum, since the order in which slots came does not matter."""
        of_one = blake2b(f"{self._number} {slot} {run}".encode(), digest_size=16).digest()
        self.digest = (self.digest + sign * int.from_bytes(of_one)) % (1 << 128)


def _with(free: list[Run], run: Run) -> list[Run]:
    """Free runs and one more, joined with what is next to it."""
    (first, count), place = run, bisect(free, run)
    last = place
    if place and sum(free[place - 1]) == first:
        place -= 1
        first, count = free[place][0], free[place][1] + count
    if last < len(free) and free[last][0] == first + count:
        count += free[last][1]
        last += 1
    return [*free[:place], (first, count), *free[last:]]
