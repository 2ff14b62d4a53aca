"""Where a request goes among several replicas: by which key the door asks, and which one Ray Serve takes for a key."""

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

KEPT_KEYS = 512  # whose requests a replica is known for


def at_once(rows: int) -> int:
    """How many requests of one key a replica is given at once. Few: what others of the replica's users wait behind is
    the sum of all its crowds, and where an adapter is at two replicas it is found as often as before."""
    return max(2, rows // 4)


class Crowds:
    """Who asks more at once than a replica is given finds the rest of the answers at others.

    Args:
        most: requests of one key at once that go by this key.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def one(self, key: str) -> Iterator[str]:
        """The key by which one more request is asked, as long as it is under way: its own, or another one of the
        same adapters. "" stands for no adapters, and stays."""
        crowd = self._under_way[key] // self.most if key else 0
        self._under_way[key] += 1
        try:
            yield f"{key}-{crowd}" if crowd else key
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]


class Placement:
    """A request goes to a replica that is known for its key; if there is none, to one of those that are known for the
    fewest. Of more than two such, two are drawn, and the one with less under way takes it.

    Ray hears within a tenth of a second which keys a replica has come to know. Here it is known at once, so no request
    of a user's first instant goes elsewhere.

    Args:
        replicas: how many there are.
        seed: of what is drawn.
    """

    def __init__(self, replicas: int, seed: int = 0) -> None:
        self.known: list[OrderedDict[Hashable, None]] = [OrderedDict() for _ in range(replicas)]
        self._holders: dict[Hashable, list[int]] = {}
        self._chance = random.Random(seed)

    def candidates(self, key: Hashable) -> list[int]:
        """The replicas of which one is to be chosen."""
        if holders := self._holders.get(key):
            return holders
        counts = [len(keys) for keys in self.known]
        fewest = min(counts)
        return [number for number, count in enumerate(counts) if count == fewest]

    def choose(self, key: Hashable, under_way: Callable[[int], int]) -> int:
        """The replica for a request, which is known for the key from now on.

        Args:
            key: of the request's adapters.
            under_way: requests that a replica has.
        """
        found = self.candidates(key)
        pair = self._chance.sample(found, min(2, len(found)))
        chosen = pair[0] if len(pair) == 1 else min(pair, key=under_way)
        self._keep(chosen, key)
        return chosen

    def _keep(self, replica: int, key: Hashable) -> None:
        keys = self.known[replica]
        if key not in keys:
            if len(keys) >= KEPT_KEYS:
                gone = keys.popitem(last=False)[0]
                self._holders[gone].remove(replica)
                if not self._holders[gone]:
                    del self._holders[gone]
            keys[key] = None
            self._holders.setdefault(key, []).append(replica)
        keys.move_to_end(key)
