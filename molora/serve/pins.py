"""The pins of a store on a running server: what is pinned by any of those that share it stays in the model."""

import logging
from functools import partial
from typing import TYPE_CHECKING

from molora.errors import StoreError
from molora.serve.polling import EVERY_S, Polling

if TYPE_CHECKING:
    from molora.serve.engine import Engine
    from molora.serve.store import AdapterStore

log = logging.getLogger("molora.serve")


class StoredPins:
    """Keeps an engine's pools to the pins of their store, until :meth:`close`.

    What was pinned at another server does not come by itself, but stays once a request has brought it: users' requests
    go where their adapter is.

    Args:
        engine: it was started.
        store: where its pools find their adapters. One that does not answer yet is asked again.
        every_s: seconds between two looks.
    """

    def __init__(self, engine: "Engine", store: "AdapterStore", every_s: float = EVERY_S) -> None:
        self._engine, self._store = engine, store
        try:
            self.look()
        except (StoreError, OSError) as error:  # a server starts without its store, too
            log.error("The store's pins cannot be read: %s", error)
        self._polling = Polling("The store's pins cannot be read", self.look, every_s)

    def look(self) -> None:
        """
        Raises:
            StoreError: the store cannot be reached.
        """
        for layer, pool in self._engine.pools.items():
            names = frozenset(self._store.pinned(layer))
            if names != pool.staying:
                self._engine.change([], partial(pool.keep, names))

    def close(self) -> None:
        """Ends it."""
        self._polling.close()
