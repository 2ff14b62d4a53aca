"""What an adapter store knows without asking its files: which names there are, and what is cached on this machine."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from molora.errors import StoreError

_WAIT_S = 60  # for another process's transaction
_TABLES = (
    "CREATE TABLE IF NOT EXISTS names (layer TEXT, name TEXT, PRIMARY KEY (layer, name)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS cached (path TEXT PRIMARY KEY, bytes INTEGER, used REAL) WITHOUT ROWID",
)


class Index:
    """A SQLite file, for all threads and processes of one machine. It may be deleted: the store can make it anew.

    Args:
        file: made if it is not there.

    Raises:
        StoreError: it cannot be opened; and of all methods: it cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self._lock, self._file = threading.Lock(), file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(file, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            _write_ahead(self._base)
            self._base.execute("PRAGMA synchronous=NORMAL")  # a loss of power may lose rows; reindex() finds them
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"The index {file} cannot be opened ({error}). Delete it, and call reindex().") from error
        with self._writing() as base:
            for table in _TABLES:
                base.execute(table)

    def close(self) -> None:
        self._base.close()

    def add(self, layer: str, name: str) -> None:
        with self._writing() as base:
            base.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (layer, name))

    def drop(self, layer: str, name: str) -> None:
        with self._writing() as base:
            base.execute("DELETE FROM names WHERE layer = ? AND name = ?", (layer, name))

    def all(self) -> set[tuple[str, str]]:
        """(layer, name) of all."""
        with self._reading() as base:
            return set(base.execute("SELECT layer, name FROM names"))

    def change(self, gone: Iterable[tuple[str, str]], new: Iterable[tuple[str, str]]) -> None:
        with self._writing() as base:
            base.executemany("DELETE FROM names WHERE layer = ? AND name = ?", gone)
            base.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", new)

    def names(self, layer: str, prefix: str, after: str, limit: int) -> list[str]:
        """The next ``limit`` names behind ``after`` that begin with ``prefix``, in order."""
        end = prefix + "\x7f"  # names are ASCII letters, digits and "_.-": all sort before it
        query = "SELECT name FROM names WHERE layer = ? AND name >= ? AND name < ? AND name > ? ORDER BY name LIMIT ?"
        with self._reading() as base:
            return [name for (name,) in base.execute(query, (layer, prefix, end, after, limit))]

    def count(self) -> int:
        with self._reading() as base:
            return base.execute("SELECT COUNT(*) FROM names").fetchone()[0]

    def used(self, path: str, size_bytes: int) -> None:
        """Notes that a cached folder is handed out now."""
        with self._writing() as base:
            base.execute("INSERT OR REPLACE INTO cached VALUES (?, ?, ?)", (path, size_bytes, time.time()))

    def evict(self, most_bytes: int, idle_s: float, remove: Callable[[str], None]) -> int:
        """Removes the folders that were not used for longest, down to ``most_bytes``, but none of the last ``idle_s``;
        returns how many.

        It happens within one transaction: ``used`` in another process comes before, and the folder stays, or after,
        and the folder is seen to be gone.
        """
        with self._writing() as base:
            (total,) = base.execute("SELECT COALESCE(SUM(bytes), 0) FROM cached").fetchone()
            if total <= most_bytes:
                return 0
            old = time.time() - idle_s
            rows = base.execute("SELECT path, bytes FROM cached WHERE used <= ? ORDER BY used", (old,)).fetchall()
            removed = 0
            for path, size_bytes in rows:
                if total <= most_bytes:
                    break
                remove(path)
                base.execute("DELETE FROM cached WHERE path = ?", (path,))
                total -= size_bytes
                removed += 1
            return removed

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._base
            except sqlite3.Error as error:
                raise StoreError(
                    f"The index {self._file} cannot be used ({error}). Make room on its disk; or stop what uses it, "
                    "delete it, and call reindex()."
                ) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One short transaction."""
        with self._reading() as base:
            base.execute("BEGIN IMMEDIATE")
            try:
                yield base
                base.execute("COMMIT")
            except BaseException:
                if base.in_transaction:  # some errors have ended it
                    base.execute("ROLLBACK")
                raise


def _write_ahead(base: sqlite3.Connection) -> None:
    """SQLite does not wait for another process that changes to this mode in the same moment."""
    ends = time.monotonic() + _WAIT_S
    while True:
        try:
            base.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
            time.sleep(0.01)
