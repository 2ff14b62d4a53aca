"""Who waits, and whose turn it is: users are served in turn, each one's requests in the order in which they came."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_OVERTAKEN = 16
"""So many with adapters begin before one for whose adapter there is no room; then they wait until it has begun."""


class Turns(Generic[T]):
    """Queues by user."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        for queue in self._queues.values():
            yield from queue

    def add(self, user: str, item: T, first: bool = False) -> None:
        """``first``: before all others, of all users."""
        queue = self._queues.setdefault(user, deque())
        if first:
            queue.appendleft(item)
            self._queues.move_to_end(user, last=False)
        else:
            queue.append(item)
        self._size += 1

    def take(self, ready: Callable[[T], bool]) -> T | None:
        """The next one that is ready; its user's turn is then over. Those that are not keep their place."""
        for user, queue in self._queues.items():
            for place, item in enumerate(queue):
                if ready(item):
                    del queue[place]
                    self._size -= 1
                    self._queues.move_to_end(user)
                    if not queue:
                        del self._queues[user]
                    return item
        return None

    def drop(self, gone: Callable[[T], bool]) -> list[T]:
        """Takes out all that are ``gone``."""
        found = [item for item in self if gone(item)]
        if found:
            for user in list(self._queues):
                kept = deque(item for item in self._queues[user] if item not in found)
                self._queues[user] = kept
                if not kept:
                    del self._queues[user]
            self._size -= len(found)
        return found
