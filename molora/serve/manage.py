"""Adapters of the running stack: what there is, one more or another version of one by upload, one less."""

import asyncio
import json
import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from starlette.datastructures import UploadFile

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.checks import check_fits
from molora.errors import AdapterError, AdapterFormatError, AdapterNotFoundError, StackError
from molora.key_file import KEY_FILE
from molora.serve.door import needs
from molora.serve.keys import Key
from molora.serve.names import UnknownNameError
from molora.serve.replies import AdapterCard, AdapterList, Names
from molora.stack import StackLayer, check_name

if TYPE_CHECKING:
    from molora.serve.engine import Engine
    from molora.serve.pool import Pool, Read
    from molora.serve.store import AdapterStore

log = logging.getLogger("molora.serve")

MOST_CONFIG_BYTES = 1 << 20
PageSize = Annotated[int, Query(ge=1, le=1000)]
Manager = Annotated[Key, Depends(needs("manage"))]


def adapter_routes(engine: "Engine", store: "AdapterStore | None" = None) -> APIRouter:
    """The routes under /v1/adapters."""
    router, adapters = APIRouter(prefix="/v1/adapters"), LiveAdapters(engine, store)

    @router.get("")
    async def listed(key: Manager) -> AdapterList:
        """Every adapter, also those of users: this is for who manages."""
        return AdapterList(data=adapters.cards())

    @router.get("/{layer}")
    async def names(layer: str, key: Manager, after: str = "", limit: PageSize = 100, pinned: bool = False) -> Names:
        """A page of the names of a layer's adapters, the store's among them, in order behind ``after``; ``pinned``: of
        those alone that stay in the model."""
        found = adapters.pinned if pinned else adapters.names
        return Names(data=await asyncio.to_thread(found, layer, after, limit))

    @router.post("/{layer}/{name}", status_code=201)
    async def put(layer: str, name: str, request: Request, key: Manager) -> AdapterCard:
        """Takes a PEFT folder's two files as multipart/form-data, and for a keyed layer the key beside them; what runs
        ends with what it began with."""
        keyed = adapters.layer(layer).keyed
        check_name(name, "an adapter")
        async with request.form(max_files=3 if keyed else 2, max_fields=0) as form:
            return await adapters.put(layer, name, _files([value for _, value in form.multi_items()], keyed))

    @router.delete("/{layer}/{name}", status_code=204)
    async def remove(layer: str, name: str, key: Manager) -> None:
        """Takes it out of the running stack, once nothing uses it any more."""
        await adapters.remove(layer, name)

    @router.put("/{layer}/{name}/pin", status_code=204)
    async def pin(layer: str, name: str, key: Manager) -> None:
        """Brings a store's adapter into the model, where it stays whether or not it is asked for."""
        await adapters.pin(layer, name)

    @router.delete("/{layer}/{name}/pin", status_code=204)
    async def unpin(layer: str, name: str, key: Manager) -> None:
        """It may leave the model again when others need its room."""
        await adapters.unpin(layer, name)

    return router


class LiveAdapters:
    """Changes the adapters of an engine's model, one change at a time. Uploads live as long as this, but those for a
    layer whose adapters come from ``store``: they are put there."""

    def __init__(self, engine: "Engine", store: "AdapterStore | None" = None) -> None:
        self._engine, self._store = engine, store
        self._changing = asyncio.Lock()
        self._home = TemporaryDirectory(prefix="molora-uploads-", ignore_cleanup_errors=True)
        self._folders: dict[str, Path] = {}  # of what was uploaded, by label

    def layer(self, name: str) -> StackLayer:
        """
        Raises:
            UnknownNameError: there is none.
        """
        layers = self._engine.model.stack.layers
        for layer in layers:
            if layer.name == name:
                return layer
        raise UnknownNameError(f"There is no layer {name!r}; there are {', '.join(one.name for one in layers)}.")

    def cards(self) -> list[AdapterCard]:
        """All but those that a pool brings and takes away itself."""
        live = list(self._engine.model.adapters.items())
        return [_card(label, adapter) for label, adapter in live if label.partition("/")[0] not in self._engine.pools]

    def names(self, layer: str, after: str, limit: int) -> list[str]:
        """
        Raises:
            UnknownNameError: there is no such layer.
        """
        pool = self._engine.pools.get(layer)
        present = list(self.layer(layer).adapters)  # of which the engine's thread may add and remove some meanwhile
        own = [name for name in present if pool is None or not pool.owns(name)]
        stored = (
            self._store.names(layer, limit=limit, after=after) if self._store is not None and pool is not None else []
        )
        return sorted({*(name for name in own if name > after), *stored})[:limit]

    def pinned(self, layer: str, after: str, limit: int) -> list[str]:
        """
        Raises:
            UnknownNameError: there is no such layer. StackError: nothing comes and goes there.
        """
        pool = self._pool(layer)
        found = pool.pinned if self._store is None else self._store.pinned(layer)
        return [name for name in found if name > after][:limit]

    async def pin(self, layer: str, name: str) -> None:
        """
        Raises:
            UnknownNameError: there is none. StackError: it is always in the model, or too many are pinned. BusyError:
            others use all room now.
        """
        pool = self._pool(layer)
        if not pool.owns(name):
            raise StackError(f"{layer}/{name} is of the stack itself: it is always in the model.")
        try:
            read = await asyncio.to_thread(pool.read, name)
        except AdapterNotFoundError as error:
            raise UnknownNameError(f"Layer {layer!r} has no adapter {name!r}.") from error
        except AdapterError as error:  # its words tell where it is kept
            log.error("%s/%s cannot be pinned: %s", layer, name, error)
            raise type(error)(f"{layer}/{name} cannot be used here as it is stored: see the server's log.") from error
        await asyncio.to_thread(self._pin, layer, pool, read)

    async def unpin(self, layer: str, name: str) -> None:
        """
        Raises:
            UnknownNameError: it is not pinned. StackError: nothing comes and goes there.
        """
        if not await asyncio.to_thread(self._unpin, layer, self._pool(layer), name):
            raise UnknownNameError(f"{layer}/{name} is not pinned.")

    async def put(self, layer: str, name: str, files: Mapping[str, UploadFile]) -> AdapterCard:
        """Adds an adapter, or replaces the one of this name.

        Raises:
            AdapterError: it cannot be used. Nothing has changed then.
        """
        async with self._changing:
            return await asyncio.to_thread(self._put, layer, name, files)

    async def remove(self, layer: str, name: str) -> None:
        """
        Raises:
            UnknownNameError: there is none.
        """
        async with self._changing:
            if (store := self._stored(layer, name)) is not None:
                try:
                    return await asyncio.to_thread(store.remove, layer, name)
                except AdapterNotFoundError as error:
                    raise UnknownNameError(f"Layer {layer!r} has no adapter {name!r}.") from error
            if name not in self.layer(layer).adapters:
                raise UnknownNameError(f"Layer {layer!r} has no adapter {name!r}.")
            label, model = f"{layer}/{name}", self._engine.model
            await asyncio.to_thread(self._engine.change, [label], lambda: model.remove_adapter(layer, name))
            self._forget(label)

    def _put(self, layer: str, name: str, files: Mapping[str, UploadFile]) -> AdapterCard:
        label, model = f"{layer}/{name}", self._engine.model
        folder = Path(self._home.name) / uuid.uuid4().hex
        folder.mkdir()
        try:
            for file, upload in files.items():
                with (folder / file).open("xb") as target:
                    shutil.copyfileobj(upload.file, target)
            check_upload(folder)
            if (store := self._stored(layer, name)) is not None:
                adapter = Adapter.load(folder)
                check_fits(adapter, model.base, str(model.base_name), model.adapted.backend)
                store.put(layer, name, folder)
                shutil.rmtree(folder, ignore_errors=True)
                return _card(label, adapter)
            change = model.replace_adapter if name in self.layer(layer).adapters else model.add_adapter
            self._engine.change([label], lambda: change(layer, name, folder))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, AdapterError):  # in its words the folder is no business of the client
                raise type(error)(str(error).replace(str(folder), "the upload")) from error
            raise
        self._forget(label)
        self._folders[label] = folder
        return _card(label, model.adapters[label])

    def _pin(self, layer: str, pool: "Pool", read: "Read") -> None:
        noted = self._store is not None and self._store.pin(layer, read.name)
        try:
            self._engine.change([], lambda: pool.pin(read))
        except BaseException:
            if noted and self._store is not None:
                self._store.unpin(layer, read.name)
            raise

    def _unpin(self, layer: str, pool: "Pool", name: str) -> bool:
        noted = self._store is not None and self._store.unpin(layer, name)
        return bool(self._engine.change([], lambda: pool.unpin(name))) or noted

    def _pool(self, layer: str) -> "Pool":
        pool = self._engine.pools.get(self.layer(layer).name)
        if pool is None:
            raise StackError(f"Adapters of {layer!r} are always in the model: there is nothing to pin.")
        return pool

    def _stored(self, layer: str, name: str) -> "AdapterStore | None":
        """The store, where it is that which holds an adapter of this name."""
        pool = self._engine.pools.get(layer)
        return self._store if pool is not None and pool.owns(name) else None

    def _forget(self, label: str) -> None:
        if label in self._folders:
            shutil.rmtree(self._folders.pop(label), ignore_errors=True)


def check_upload(folder: Path) -> None:
    """Reads a strange adapter before the engine does.

    Raises:
        AdapterError: it is none that can be used.
    """
    file = folder / CONFIG_FILE
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise AdapterFormatError(f"{CONFIG_FILE} is larger than {MOST_CONFIG_BYTES} bytes.")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{CONFIG_FILE} is not readable JSON.") from error
    if isinstance(config, dict):
        for key in ("rank_pattern", "alpha_pattern"):
            _check_patterns(config.get(key))
    try:
        Adapter.load(folder)
    except AdapterError:
        raise
    except Exception as error:  # what a strange file can bring torch to say
        raise AdapterFormatError(f"The upload cannot be read as an adapter ({type(error).__name__}).") from error


def _check_patterns(patterns: object) -> None:
    """They are matched as regular expressions, some of which would never end."""
    for pattern in patterns if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.\\^$*-]{1,256}", pattern) or pattern.count("*") > 2:
            raise AdapterFormatError(
                f"{pattern[:80]!r} in rank_pattern or alpha_pattern is not taken from an upload: use module names."
            )


def _files(values: list[UploadFile | str], keyed: bool) -> dict[str, UploadFile]:
    files = {value.filename or "": value for value in values if isinstance(value, UploadFile)}
    needed, may = {CONFIG_FILE, WEIGHTS_FILE}, {KEY_FILE} if keyed else set()
    if len(values) != len(files) or not needed <= set(files) <= needed | may:
        more = f", and {KEY_FILE} if it has one" if keyed else ""
        raise HTTPException(400, f"Upload two files as multipart/form-data: {CONFIG_FILE} and {WEIGHTS_FILE}{more}.")
    return files


def _card(label: str, adapter: Adapter) -> AdapterCard:
    layer, _, name = label.partition("/")
    return AdapterCard(layer=layer, name=name, ranks=adapter.ranks, parameters=adapter.parameters)
