"""How far a client may lag behind its answer before it is cut."""

import time

from starlette.types import Message

from molora.errors import MoLoRAError

MOST_UNREAD = 64  # pieces that may lie here for a client,
SLOW_S = 20.0  # and how long more may; also how long it may take to take one


class ClientGone(MoLoRAError):
    """Nobody waits for the answer any more."""


class Pace:
    """Of one client."""

    def __init__(self) -> None:
        self._behind_since: float | None = None

    def grown(self, lying: int) -> None:
        """One more piece came; ``lying`` are here now."""
        if lying > MOST_UNREAD and self._behind_since is None:
            self._behind_since = time.perf_counter()

    def taken(self, lying: int) -> None:
        """One is handed to the client; ``lying`` are still here.

        Raises:
            ClientGone: too many for too long.
        """
        if lying <= MOST_UNREAD:
            self._behind_since = None
        elif self._behind_since is not None and time.perf_counter() - self._behind_since > SLOW_S:
            raise ClientGone("The client reads too slowly.")


def is_stream(start: Message) -> bool:
    """Whether the answer that ``start`` begins comes piece by piece."""
    return dict(start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
