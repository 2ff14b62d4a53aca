"""What a running server looks at again and again: others may have changed it in the store."""

import logging
import threading
from collections.abc import Callable

from molora.errors import MoLoRAError

log = logging.getLogger("molora.serve")

EVERY_S = 10.0  # between two looks


class Polling:
    """Calls ``look`` in a thread of its own, until :meth:`close`.

    Args:
        what: is named where a look fails; what was seen before goes on then.
        look: raises a MoLoRAError where there is something that the operator should know. No error ends it.
        every_s: seconds between two looks, the first of which is that long away.
    """

    def __init__(self, what: str, look: Callable[[], None], every_s: float = EVERY_S) -> None:
        self._what, self._look, self._every_s = what, look, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="molora-polling", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._look()
            except MoLoRAError as error:
                log.error("%s: %s", self._what, error)
            except Exception:  # such as a disk that is full: the next look may do better
                log.exception("%s.", self._what)
