"""Which of a slice's pages are whose: slots hold runs of them, and the rest is free."""

from bisect import bisect
from hashlib import blake2b

Run = tuple[int, int]
"""First page, and how many."""


class Runs:
    """The runs of one slice. What each costs does not grow with how many slots hold one.

    of: slot -> its run. digest: 128 bits, equal for slices of the same number whose slots hold the same runs.
    """

    def __init__(self, number: int, pages: int) -> None:
        self.of: dict[int, Run] = {}
        self.digest = 0
        self._number = number
        self._free: list[Run] = [(0, pages)]  # in order, none next to another

    def fit(self, need: int, slot: int) -> int | None:
        """The first page of the first free run that is long enough once this slot's own is free, too."""
        own = self.of.get(slot)
        free = self._free if own is None else _with(self._free, own)
        return next((first for first, count in free if count >= need), None)

    def give(self, slot: int) -> Run | None:
        """Frees a slot's run, if it has one."""
        run = self.of.pop(slot, None)
        if run is not None:
            self._free = _with(self._free, run)
            self._count(slot, run, -1)
        return run

    def take(self, slot: int, run: Run) -> None:
        """Lets a slot, which has none, hold a run that is free."""
        first, count = run
        place = bisect(self._free, (first, float("inf"))) - 1
        start, free = self._free[place]
        left, right = (start, first - start), (first + count, start + free - first - count)
        self._free[place : place + 1] = [one for one in (left, right) if one[1]]
        self.of[slot] = run
        self._count(slot, run, 1)

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
