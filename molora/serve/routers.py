"""The router of a running server, from a store: the version that is current there serves soon after."""

import logging
import threading
from typing import TYPE_CHECKING

from molora.errors import MoLoRAError
from molora.router import Router
from molora.selection import router_rows
from molora.stack import ROUTERS

if TYPE_CHECKING:
    from molora.serve.engine import Engine
    from molora.serve.store import AdapterStore

log = logging.getLogger("molora.serve")

EVERY_S = 10.0  # between two looks at what is current


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
        self._engine, self._store, self._name, self._every_s = engine, store, name, every_s
        self.version: str | None = None
        self._refused: str | None = None  # a version that is not for this stack: told once
        self._ended = threading.Event()
        self.look()
        self._thread = threading.Thread(target=self._follow, name="molora-router", daemon=True)
        self._thread.start()

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
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.look()
            except MoLoRAError as error:  # what serves goes on
                log.error("The router %s of the store cannot serve: %s", self._name, error)
