"""Where the state of a federated training lies, beside what is to come out: one server's at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from molora.errors import FederationError

LOCK = ".lock"


def state_folder(out: Path) -> Path:
    """Where the rounds of a training lie that is to end in ``out``."""
    return out.with_name(f".{out.name}.rounds")


@contextmanager
def only_server(out: Path) -> Iterator[None]:
    """One server at a time for a training that is to end in ``out``; one that dies lets go.

    Raises:
        FederationError: there is one already.
    """
    folder = state_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise FederationError(
            f"Another server trains what is to end in {out}: wait until it is done, or choose another `out`."
        ) from None
    with held:
        yield
