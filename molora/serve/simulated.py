"""An engine on paper: the rules and limits of :mod:`molora.serve.engine`, with costs in place of a model.

It goes from one forward to the next in the engine's order and with its turns of users, and over all steps at once in
which nobody comes or goes.
"""

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from molora.serve.costs import Costs
from molora.serve.turns import MOST_OVERTAKEN, Turns

READERS = 4  # threads of a replica that bring adapters, as in the engine
HOST_BYTES = 1 << 30  # of adapters that were read and are kept, as in the pool


@dataclass(eq=False, slots=True)
class Asked:
    """A request. Moments in seconds from the beginning; ``done`` is None as long as it has no answer."""

    at: float
    user: int
    prompt: int  # tokens
    unread: int  # of them
    left: int  # tokens of the answer that are to come
    tokens: int = 0  # that have come
    replica: int = -1
    ready: float = 0.0  # its adapter is in the host's memory
    began: float = 0.0  # it got a row
    first: float = 0.0
    last: float = 0.0
    done: float | None = None
    refused: bool = False
    overtaken: int = 0  # while there was no room for its adapter

    def over(self, now: float) -> bool:
        """Whether it was answered or refused by then."""
        return self.refused or (self.done is not None and self.done <= now)


class Adapters:
    """A replica's adapters: some live, least recently used out, and what else is in the host's memory."""

    def __init__(self, costs: Costs, slots: int, chance: np.random.Generator) -> None:
        self.costs, self.slots, self.chance = costs, slots, chance
        self.most_read = max(1, HOST_BYTES // costs.adapter_bytes) if costs.adapter_bytes else None
        self.live: OrderedDict[int, int] = OrderedDict()  # user -> leases
        self.read: OrderedDict[int, float] = OrderedDict()  # user -> from when on it is in the host's memory
        self.free = [0.0] * READERS
        self.hits = self.misses = self.reads = 0

    def bring(self, user: int, now: float) -> float:
        """When the adapter is in the host's memory. Readers take the requests in the order in which they came."""
        reader = self.free.index(min(self.free))
        begun = max(now, self.free[reader])
        known = self.read.get(user)
        if known is not None:
            self.read.move_to_end(user)
            ready = max(begun, known)  # another reader may be at it, for which this one waits
        else:
            ready = begun + self._fetch()
            self.reads += 1
            self.read[user] = ready
            if self.most_read is not None and len(self.read) > self.most_read:
                self.read.popitem(last=False)
        self.free[reader] = ready
        return ready

    def _fetch(self) -> float:
        mean, spread = self.costs.fetch, self.costs.fetch_spread
        if not mean or not spread:
            return mean
        shape = (mean / spread) ** 2
        return float(self.chance.gamma(shape, mean / shape))

    def lease(self, user: int) -> float | None:
        """Seconds until it is live, which it stays until :meth:`release`; None: all room is in use."""
        takes, leases = 0.0, self.live.get(user)
        if leases is None:
            if len(self.live) >= self.slots:
                gone = next((other for other, count in self.live.items() if not count), None)
                if gone is None:
                    return None
                del self.live[gone]
            takes = self.costs.swap
            self.misses += 1
        else:
            self.hits += 1
        self.live[user] = (leases or 0) + 1
        self.live.move_to_end(user)
        return takes

    def release(self, user: int) -> None:
        self.live[user] -= 1


class Replica:
    """An engine: ``clock`` is when its thread is free for the next forward."""

    def __init__(self, costs: Costs, rows: int, slots: int, waiting: int, chance: np.random.Generator) -> None:
        self.costs, self.rows, self.most_waiting = costs, rows, waiting
        self.adapters = Adapters(costs, slots, chance)
        self.turns: Turns[Asked] = Turns()
        self.reading: list[Asked] = []
        self.running: list[Asked] = []
        self.clock = self.busy = 0.0
        self.left = costs.chunk  # tokens of prompts that may be read before the next step
        self.gaps: Counter[float] = Counter()  # seconds between two tokens of an answer -> how often
        self._steps = [costs.of_step(number) for number in range(rows + 1)]

    @property
    def under_way(self) -> int:
        """Requests that it has."""
        return len(self.turns) + len(self.reading) + len(self.running)

    def submit(self, asked: Asked) -> None:
        """Takes a request, or refuses it; to be called after ``advance(asked.at)``."""
        if len(self.turns) >= self.most_waiting:
            asked.refused = True
            return
        self.clock = max(self.clock, asked.at)
        asked.ready = self.adapters.bring(asked.user, asked.at)
        self.turns.add(str(asked.user), asked)

    def advance(self, until: float) -> None:
        """Does all that begins before ``until``."""
        while self.clock < until:
            if self.left > 0 and self._read():
                continue
            idle = self.left == self.costs.chunk and not self.running
            self.left = self.costs.chunk
            if self.running:
                self._step(until)
            elif idle:
                soonest = min((one.ready for one in self.turns), default=math.inf)
                if soonest >= until:
                    return
                self.clock = max(self.clock, soonest)

    def _read(self) -> bool:
        """One forward over prompts; False: there is nothing to read before the next step."""
        while len(self.reading) + len(self.running) < self.rows:
            if sum(one.unread for one in self.reading) >= self.left or (asked := self._next()) is None:
                break
            asked.began = self.clock
            self.reading.append(asked)
        if not self.reading:
            return False
        group = self._group()
        longest = max(one.unread for one in group)
        if len(group) > 1:  # all but the last tokens, which are for the next step
            self.left -= len(group) * longest
            self._spend(self.costs.of_prompt(len(group) * (longest - 1)))
            for one in group:
                one.unread = 0
        else:
            piece = min(longest, self.costs.chunk)
            self.left -= piece
            self._spend(self.costs.of_prompt(piece))
            group[0].unread -= piece
            if group[0].unread:
                return True
            self._tell(group[0], self.clock, 1)
        self.reading = self.reading[len(group) :]
        self.running += [one for one in group if not self._ends(one)]
        return True

    def _group(self) -> list[Asked]:
        """As :meth:`molora.serve.batch.Batch.group`: those that are read in one forward. Only the first can be partly
        read, and what is partly read is read alone."""
        found = self.reading[:1]
        for one in self.reading[1:]:
            unread = [other.unread for other in [*found, one]]
            if min(unread) < 2 or len(unread) * max(unread) > self.left or found[0].unread < found[0].prompt:
                break
            found.append(one)
        return found

    def _next(self) -> Asked | None:
        """As the engine's: the next one in turn whose adapter has come and finds room."""
        passed: list[Asked] = []

        def ready(asked: Asked) -> bool:
            if any(one.overtaken >= MOST_OVERTAKEN for one in passed):
                return False
            return asked.ready <= self.clock and asked not in passed

        while (asked := self.turns.take(ready)) is not None:
            if (takes := self.adapters.lease(asked.user)) is not None:
                self._spend(takes)
                for one in passed:
                    one.overtaken += 1
                break
            passed.append(asked)
        for one in reversed(passed):
            self.turns.add(str(one.user), one, first=True)
        return asked

    def _step(self, until: float) -> None:
        """As many steps as go on with the same sequences."""
        seconds, count = self._steps[len(self.running)], min(one.left for one in self.running)
        if self.reading:
            count = 1
        elif len(self.running) < self.rows:
            until = min(until, min((one.ready for one in self.turns), default=math.inf))
        if math.isfinite(until):
            count = min(count, max(1, math.ceil((until - self.clock) / seconds)))
        begun = self.clock
        self._spend(seconds * count)
        for one in self.running:
            self._tell(one, begun + seconds, 1)
            self._tell(one, self.clock, count - 1)
        self.running = [one for one in self.running if not self._ends(one)]

    def _tell(self, asked: Asked, now: float, count: int) -> None:
        """``count`` more tokens, evenly since the last one; the last of them comes now."""
        if not count:
            return
        if asked.tokens:
            self.gaps[round((now - asked.last) / count, 6)] += count
        else:
            asked.first = now
        asked.tokens += count
        asked.left -= count
        asked.last = now

    def _ends(self, asked: Asked) -> bool:
        if asked.left:
            return False
        asked.done = asked.last
        self.adapters.release(asked.user)
        return True

    def _spend(self, seconds: float) -> None:
        self.clock += seconds
        self.busy += seconds
