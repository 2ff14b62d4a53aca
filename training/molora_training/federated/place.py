"""Where the state of a federated training lies, beside what is to come out: one server's at a time."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from molora.atomic import write_text
from molora.errors import FederationError
from molora_training.federated.settings import FederateSettings
from molora_training.settings import from_mapping

LOCK, BEGUN = ".lock", "begun.json"


@dataclass(frozen=True)
class Begun:
    """What is kept of a training from its beginning: a name of its own, and the settings of what it went on from, which
    would be others once its adapter serves."""

    run: str
    start: Path | None
    router: Path | None

    @classmethod
    def read(cls, out: Path) -> "Begun | None":
        """Of the training that is to end in ``out``, if there is one."""
        file = state_folder(out) / BEGUN
        return from_mapping(cls, json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    @classmethod
    def write(cls, settings: FederateSettings) -> "Begun":
        """Of a training that begins."""
        own = cls(secrets.token_hex(16), settings.start, settings.router)
        write_text(state_folder(settings.out) / BEGUN, json.dumps(asdict(own), default=str) + "\n")
        return own


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
