"""The router of a running server, from a store: the version that is current there serves soon after."""

import logging
from typing import TYPE_CHECKING

from molora.errors import MoLoRAError
from molora.router import Router
from molora.selection import router_rows
from molora.serve.polling import EVERY_S, Polling
from molora.stack import ROUTERS

if TYPE_CHECKING:
    from molora.serve.engine import Engine
    from molora.serve.store import AdapterStore

log = logging.getLogger("molora.serve")


class StoredRouter:
    """Keeps an engine's router the one that is current in a store, until :meth:`close`. What is being answered when
    another one comes goes on with that one, its text read again.

    Args:
        engine: whose model has the stack that the routers are for; it was started.
        store, name: where they are.
        every_s: seconds between two looks.

    Raises:
        RouterError: there is none of that name, or it is for another stack. StoreError: it cannot be reached.
    """

    def __init__(self, engine: "Engine", store: "AdapterStore", name: str, every_s: float = EVERY_S) -> None:
        self._engine, self._store, self._name = engine, store, name
        self.version: str | None = None
        self._refused: str | None = None  # a version that is not for this stack: told once
        self.look()
        self._polling = Polling(f"The router {name} of the store cannot serve", self.look, every_s)

    def look(self) -> None:
        """Takes the version that is current, if it is another one."""
        current = self._store.current(ROUTERS, self._name)
        if current == self.version or current == self._refused:
            return
        router, model = self._store.get_router(self._name, current), self._engine.model
        try:
            if isinstance(router, Router):
                router.add_missing(router_rows(model.stack))
            self._engine.change([], lambda: model.set_router(router))
        except MoLoRAError:
            self._refused = current
            raise
        if self.version is not None:
            log.info("Version %s of the router %s serves.", current, self._name)
        self.version = current

    def close(self) -> None:
        """Ends it."""
        self._polling.close()
