"""Keys of the server's API: who may use it, who may change its adapters, and whose adapters a key may name."""

import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from filelock import FileLock

from molora.atomic import write_text
from molora.errors import ConfigError
from molora.stack import check_name

Scope: TypeAlias = Literal["use", "manage"]
SCOPES: tuple[Scope, ...] = ("use", "manage")


@dataclass(frozen=True)
class Key:
    """What a token allows. ``user``: the only one whose adapter it may select in shared layers; None: any."""

    name: str
    scopes: tuple[str, ...]
    user: str | None = None


@dataclass(frozen=True)
class _Entry:
    name: str
    hash: str
    scopes: tuple[str, ...]
    user: str | None = None


class Keys:
    """The keys in a file, which is read again when it has changed.

    Raises:
        ConfigError: the file is there and holds something else.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file).expanduser()
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._read: tuple[int, ...] | None = None  # which state of the file the entries are
        self._current()

    def create(self, name: str, scopes: Iterable[str], user: str | None = None) -> str:
        """Makes a key; the token it returns is kept nowhere.

        Raises:
            ConfigError: the name is taken, or there is no such scope. StackError: the name is no plain name.
        """
        check_name(name, "a key")
        wanted = tuple(dict.fromkeys(scopes))
        if not wanted or set(wanted) - set(SCOPES):
            raise ConfigError(f"A key needs scopes out of {', '.join(SCOPES)}, not {', '.join(wanted) or 'none'}.")
        if user is not None:
            check_name(user, "a user")
        token = f"molora-{secrets.token_urlsafe(32)}"
        with self._changed() as entries:
            if any(entry.name == name for entry in entries):
                raise ConfigError(f"There is a key {name!r} already: choose another name, or revoke it.")
            entries.append(_Entry(name, _hash(token), wanted, user))
        return token

    def find(self, token: str) -> Key | None:
        """The key of a token, or None.

        Raises:
            ConfigError: the file has become unreadable.
        """
        hashed, found = _hash(token), None
        for entry in self._current():  # all of them, so that the time tells nothing
            if hmac.compare_digest(entry.hash, hashed):
                found = Key(entry.name, entry.scopes, entry.user)
        return found

    def revoke(self, name: str) -> None:
        """Takes a key away; a server that runs stops to take it.

        Raises:
            ConfigError: there is none of this name.
        """
        with self._changed() as entries:
            left = [entry for entry in entries if entry.name != name]
            if len(left) == len(entries):
                raise ConfigError(f"There is no key {name!r}; there are {', '.join(self.names()) or 'none'}.")
            entries[:] = left

    def names(self) -> list[str]:
        return [entry.name for entry in self._current()]

    @contextmanager
    def _changed(self) -> Iterator[list[_Entry]]:
        """The entries, to be changed in place; written when that went well."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock"):
            entries = list(self._current())
            yield entries
            text = json.dumps({"keys": [asdict(entry) for entry in entries]}, indent=1)
            before = os.umask(0o077)  # from its first byte nobody else may read it
            try:
                write_text(self.file, f"{text}\n")
            finally:
                os.umask(before)

    def _current(self) -> list[_Entry]:
        with self._lock:
            try:
                state = self.file.stat()
            except FileNotFoundError:
                self._entries, self._read = [], None
                return self._entries
            mark = (state.st_mtime_ns, state.st_size, state.st_ino)
            if mark != self._read:
                self._entries, self._read = _load(self.file), mark
            return self._entries


def _hash(token: str) -> str:
    # A plain hash is enough: the token is 32 random bytes, which no list of likely passwords holds.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _load(file: Path) -> list[_Entry]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        entries = [_Entry(**{**entry, "scopes": tuple(entry["scopes"])}) for entry in data["keys"]]
        if not all(isinstance(entry.hash, str) and entry.hash.isascii() for entry in entries):
            raise TypeError("a hash is no text")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no file of keys ({error}). Make one with `molora serve --new-key NAME`."
        ) from error
    return entries
