"""What people teach the demo: learnt, kept, rolled back, forgotten, and private to the browser that taught it.

A browser is known by its key, a secret that it alone has. What it teaches lies in a folder of its own and comes into
the model when it asks; the saved folder of the model is never written to.
"""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.atomic import write_text
from molora.base import cache_dir
from molora.errors import MoLoRAError
from molora.factors import Factors, write_factors
from molora.personalize.documents import examples_of
from molora.personalize.shipped import all_shipped
from molora.selection import Choice
from molora.stack import StackLayer
from molora_demo import ways
from molora_demo.allowed import Allowed
from molora_demo.private import Private
from molora_demo.remember import SCRATCH, Said, Told, learn_chat, missing, room_for
from molora_demo.shelf import Lesson, Shelf, checked_title, usable

SECRET = "secret"
OLD_S = 6 * 3600  # after which a folder of a learning has nobody any more
NO_KEY = "This page has no key of its own yet: reload it, and allow it to keep local data."


@dataclass(frozen=True)
class Limits:
    """adapters, size: of one browser; size in bytes. live: private adapters in the model at once. epochs: over what is
    asked of a chat. lost: by which share the loss on everyday talk may grow by what was learnt, and which share of what
    earlier chats told may be lost."""

    adapters: int = 16
    size: int = 64 * 2**20
    live: int = 64
    epochs: int = 10
    lost: float = 0.25


class Lessons:
    """Args:
    model: a `MoLoRAModel`; private adapters come into it and leave it.
    home: where lessons lie. Default: a folder in MoLoRA's cache.
    networks: folders of what makes adapters at once: "document", "description", "profile", "pieces"; of what is not
        named those that are shipped for the model's base.
    """

    def __init__(
        self,
        model: Any,
        home: str | Path | None = None,
        networks: Mapping[str, Path] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.home = Path(home).expanduser() if home is not None else cache_dir() / "molora-demo"
        self.networks = {**all_shipped(str(model.base_name)), **(networks or {})}
        self.limits = limits or Limits()
        if unknown := set(self.networks) - set(ways.NETWORKS):
            raise MoLoRAError(f"There is no network {sorted(unknown)[0]!r}; there are {', '.join(ways.NETWORKS)}.")
        self.private = Private(model, self.limits.live)
        self.allowed = Allowed(model, self.private)
        self._writing = threading.RLock()
        self._learning: set[Path] = set()  # folders of browsers of which a chat is being learnt
        for left in self.home.glob(f"{SCRATCH}*"):
            if left.is_dir() and time.time() - left.stat().st_mtime > OLD_S:
                shutil.rmtree(left, ignore_errors=True)

    def secret(self) -> str:
        """What a `gr.BrowserState` is to be encrypted with: the same after a restart, or browsers lose their keys."""
        file = self.home / SECRET
        with self._writing:
            if not file.is_file():
                self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_text(file, secrets.token_hex(16))
                file.chmod(0o600)
            return file.read_text(encoding="utf-8")

    # What may act.

    def visible(self, key: object, selection: Mapping[str, Choice]) -> dict[str, Choice]:
        """``selection`` as this browser may have it: "auto" is among public adapters and its own, in every layer. Its
        own that are needed come into the model.

        Raises:
            MoLoRAError: it names what is not there for this browser, or something of its own is damaged.
        """
        found = self.allowed(selection, self._own(key))
        self.private.afresh()
        return found

    def choices(self, key: object, layer: StackLayer) -> list[tuple[str, str]]:
        """(title, name) of what this browser may select in a layer: what is public, then its own."""
        own = [(f"{one.title} (yours)", one.name) for one in self._own(key) if one.layer == layer.name]
        return [*((name, name) for name in self.private.public(layer)), *own]

    def titles(self, key: object) -> dict[str, str]:
        """By the name that a route tells, what its owner calls it."""
        return {one.name: one.title for one in self._own(key)}

    # What is there.

    def table(self, key: object) -> list[Lesson]:
        """What this browser has taught.

        Raises:
            MoLoRAError: its folder is damaged.
        """
        return self._shelf(key).lessons() if usable(key) else []

    def used(self, key: object) -> int:
        """Bytes of this browser's files."""
        return self._shelf(key).used if usable(key) else 0

    def shared_layer(self) -> StackLayer | None:
        """The layer of users."""
        return next((layer for layer in self.model.stack.layers if layer.shared), None)

    def unready(self, way: str) -> str:
        """Why "chat", "document", "description", "profile" or "pieces" is closed; nothing if it is open."""
        if way in ("chat", "profile", "pieces") and self.shared_layer() is None:
            return "This stack has no layer for users: one with `shared: true` is needed."
        if way == "chat":
            lacking = missing()
            return f"This way needs {', '.join(lacking)}: `pip install 'molora[train,personalize]'`." if lacking else ""
        return ways.unready(way, self.networks)

    # What changes.

    def remember(
        self, key: object, title: str, turns: Sequence[Said], on_step: Callable[[int, int], None] | None = None
    ) -> Told:
        """Learns a chat; see :func:`molora_demo.remember.learn_chat`. The model that serves is not touched.

        Raises:
            MoLoRAError: it cannot be learnt, or ``on_step`` stopped it. Nothing has changed then.
        """
        self._open("chat")
        shelf, title, layer = self._shelf(key), checked_title(title), self.shared_layer()
        assert layer is not None
        self._room(shelf, layer.name, title, room_for(self.model.base, shelf, layer.name, title))
        with self._writing:
            self._idle(shelf)
            self._learning.add(shelf.folder)
        try:
            told = learn_chat(
                shelf, layer.name, title, turns, self.limits.epochs, self.limits.lost, on_step or (lambda _, of: None)
            )
            if told.serves:
                name = shelf.name_of(layer.name, title)
                shelf.note(layer.name, name, title, "from a chat", told.version, told.seconds)
            return told
        finally:
            self._learning.discard(shelf.folder)

    def bring(self, key: object, layer: str, title: str, files: Sequence[Path]) -> Lesson:
        """Takes an adapter that was uploaded. Raises MoLoRAError: it is none for this base; nothing has changed."""
        started, title = time.monotonic(), checked_title(title)
        with self._scratch() as scratch:
            folder = Path(scratch) / "adapter"
            ways.write_upload(self.model, files, folder, title)
            return self._keep(key, layer, title, folder, "brought as a file", started)

    def document(self, key: object, layer: str, title: str, file: Path) -> Lesson:
        """Reads a document, by the base in its turn."""
        self._open("document")
        started = time.monotonic()
        text = ways.document_text(self.model, file)
        factors = ways.of_document(self.model, self.networks["document"], text)
        return self._made(
            key, layer, title, factors, "from a document", started, examples_of(text, self.model.tokenizer)
        )

    def describe(self, key: object, layer: str, title: str, text: str) -> Lesson:
        """Makes what a sentence describes."""
        self._open("description")
        started = time.monotonic()
        factors = ways.of_description(self.model, self.networks["description"], text)
        return self._made(key, layer, title, factors, "from a description", started)

    def history(self, key: object, title: str, file: Path, way: str) -> Lesson:
        """Makes a user's adapter of what that user said; ``way``: "profile" or "pieces"."""
        if way not in ("profile", "pieces"):
            raise MoLoRAError("A history is used by its profile or by pieces.")
        self._open(way)
        started, title, layer = time.monotonic(), checked_title(title), self.shared_layer()
        assert layer is not None
        said = ways.history_of(file, title)
        make = ways.of_profile if way == "profile" else ways.of_pieces
        how = "from a history, by its profile" if way == "profile" else "from a history, by others' pieces"
        return self._made(key, layer.name, title, make(self.model, self.networks[way], said), how, started)

    def rollback(self, key: object, layer: str, name: str) -> Lesson:
        """Lets the version before serve, from the next answer on; the newer one is gone."""
        with self._writing:
            shelf = self._shelf(key)
            self._idle(shelf)
            shelf.rollback(layer, name)
            return shelf.find(layer, name)

    def forget(self, key: object, layer: str, name: str) -> Lesson:
        """Takes an adapter out of the model and off the disk, with all its versions."""
        with self._writing:
            shelf = self._shelf(key)
            self._idle(shelf)
            lesson = shelf.find(layer, name)
            self.private.drop(layer, name)
            shelf.forget(layer, name)
            return lesson

    def forget_all(self, key: object) -> None:
        """Takes all that this browser taught away, also what is damaged."""
        with self._writing:
            shelf = self._shelf(key)
            self._idle(shelf)
            for label in self.private.under(shelf.folder):
                self.private.drop(*label.split("/"))
            shelf.forget_all()

    # Inside.

    def _own(self, key: object) -> list[Lesson]:
        """A damaged folder has nothing that could act."""
        try:
            return self.table(key)
        except MoLoRAError:
            return []

    def _shelf(self, key: object) -> Shelf:
        if not usable(key):
            raise MoLoRAError(NO_KEY)
        return Shelf(self.home, str(key), str(self.model.base_name), list(self.model.stack.layers))

    def _idle(self, shelf: Shelf) -> None:
        """Raises MoLoRAError: a chat is being learnt, which would bring back what is taken away meanwhile."""
        if shelf.folder in self._learning:
            raise MoLoRAError("A chat is being learnt: wait for it, or stop it first.")

    def _open(self, way: str) -> None:
        if why := self.unready(way):
            raise MoLoRAError(why.replace("`", ""))

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.home, prefix=SCRATCH)

    def _made(
        self, key: object, layer: str, title: str, factors: Factors, how: str, started: float,
        examples: Sequence[str] = (),
    ) -> Lesson:  # fmt: skip
        with self._scratch() as scratch:
            folder = Path(scratch) / "adapter"
            write_factors(folder, factors, str(self.model.base_name))
            return self._keep(key, layer, checked_title(title), folder, how, started, examples)

    def _keep(
        self, key: object, layer: str, title: str, folder: Path, how: str, started: float, examples: Sequence[str] = ()
    ) -> Lesson:
        """Gives a PEFT folder its place as a new version that serves."""
        own = self.model.stack[layer]
        ways.check_folder(self.model, folder, title)
        with self._writing:
            shelf = self._shelf(key)
            self._idle(shelf)
            self._room(shelf, layer, title, sum(file.stat().st_size for file in folder.iterdir()))
            shelf.open()
            name = shelf.name_of(layer, title)
            versions = shelf.versions(layer, name)
            before = [version.number for version in versions.all()]
            made = versions.add(folder, command=how)
            try:
                if examples and own.routed:
                    self.private.bring(layer, name, versions.path(made.number))
                    labels = {f"{one.layer}/{one.name}" for one in shelf.lessons()} | {f"{layer}/{name}"}
                    self.private.fit(layer, name, examples, labels)
                versions.promote(made.number)
            except BaseException:
                self.private.drop(layer, name)
                shelf.drop(layer, name, before)
                raise
            shelf.note(layer, name, title, how, made.number, time.monotonic() - started)
            return shelf.find(layer, name)

    def _room(self, shelf: Shelf, layer: str, title: str, more: int) -> None:
        """Raises MoLoRAError: this browser has taught as much as it may."""
        lessons, name = shelf.lessons(), shelf.name_of(layer, title)
        if len(lessons) >= self.limits.adapters and all((one.layer, one.name) != (layer, name) for one in lessons):
            raise MoLoRAError(f"You have taught {len(lessons)} things, the most there may be: forget one first.")
        if shelf.used + more > self.limits.size:
            raise MoLoRAError(
                f"There is no room: {shelf.used / 2**20:.1f} of {self.limits.size / 2**20:.0f} MiB are used, and this "
                f"needs {more / 2**20:.1f}. Forget something first."
            )


__all__ = ["Lesson", "Lessons", "Limits", "Told"]
