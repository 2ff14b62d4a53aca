"""A loaded model follows its saved folder: what was promoted there serves from the next turn on."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.errors import MoLoRAError
from molora.router import Router
from molora.saved import MANIFEST, load_router, read_manifest
from molora.selection import router_rows
from molora.stack import Stack

if TYPE_CHECKING:
    from molora.model import MoLoRAModel


class Following:
    """Keeps ``model`` at what ``folder`` names.

    Args:
        model: loaded from ``folder``.
        folder: a saved MoLoRA; anything else is never followed.
    """

    def __init__(self, model: "MoLoRAModel", folder: str | Path) -> None:
        self.model, self.folder = model, Path(folder).expanduser()
        self._mark = self._stamp()
        self._seen = read_manifest(self.folder) if self._mark else {}

    def catch_up(self) -> list[str]:
        """Brings in what changed since the last call; a generation under way ends with what it began with.

        Returns:
            The names of adapters ("layer/name") that were replaced, added or removed, and "router".

        Raises:
            MoLoRAError: something new cannot be used. The rest has been brought in, and it is not tried again before
                the folder changes again.
        """
        mark = self._stamp()
        if mark is None or mark == self._mark:
            return []
        before, now = self._seen, read_manifest(self.folder)
        self._mark, self._seen = mark, now
        changed, failed = [], []
        for name, bring_in in self._changes(before, now):
            try:
                bring_in()
                changed.append(name)
            except MoLoRAError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return changed

    def _changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
        """What differs, and how it comes into the model: the router last, which needs its adapters there."""
        model = self.model
        old, new = (Stack.from_dict(one["stack"], self.folder) for one in (before, now))
        for layer in new.layers:
            if layer.name not in old or layer.name not in model.stack:
                continue  # another stack: that takes a new start
            was: dict[str, Any] = old[layer.name].adapters
            for name, path in layer.adapters.items():
                if name not in was:
                    yield f"{layer.name}/{name}", partial(model.add_adapter, layer.name, name, path)
                elif was[name] != path:
                    yield f"{layer.name}/{name}", partial(model.replace_adapter, layer.name, name, path)
            for name in was.keys() - layer.adapters.keys():
                yield f"{layer.name}/{name}", partial(model.remove_adapter, layer.name, name)
        if before["router"] != now["router"]:
            yield "router", partial(self._take_router, now["router"])

    def _take_router(self, entry: Any) -> None:
        router = load_router(self.folder, entry)
        if isinstance(router, Router):
            router.add_missing(router_rows(self.model.stack))
        self.model.set_router(router)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            about = (self.folder / MANIFEST).stat()
        except OSError:
            return None
        return about.st_mtime_ns, about.st_ino
