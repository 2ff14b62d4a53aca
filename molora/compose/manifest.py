"""store.json of a compressed store, read whole and checked before anything that it names is opened; and the report of
its making."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from molora.errors import AdapterFormatError, AdapterNotFoundError
from molora.stack import check_name

FORMAT = 2
MANIFEST = "store.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of one range: no core overflows


@dataclass(frozen=True)
class Entry:
    """An adapter in a store.

    Args:
        cluster: whose bases are nearest to it. error: ||Delta - U S V^T|| / ||Delta|| over all its modules.
        raw: it is kept as it came, for that error is too large.
        sha256: of the weights that it came with. source_bytes: of these and their config.
    """

    cluster: int
    error: float
    raw: bool
    sha256: str
    source_bytes: int


@dataclass(frozen=True)
class Shapes:
    """Of one module's basis: U [out, c], V [in, c]."""

    U: tuple[int, int]
    V: tuple[int, int]


@dataclass(frozen=True)
class Manifest:
    """base: as its users name it. basis: the most columns of U and of V. dtype: of all that is kept compressed.
    most_error: of an adapter that is not kept raw. clusters: of each its modules. adapters: by name."""

    base: str
    basis: int
    dtype: str
    most_error: float
    clusters: Sequence[Mapping[str, Shapes]]
    adapters: Mapping[str, Entry]

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) by module."""
        return {name: (one.V[0], one.U[0]) for cluster in self.clusters for name, one in cluster.items()}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises:
        AdapterNotFoundError: there is no store. AdapterFormatError: it is damaged, or of another format.
        """
        file = folder / MANIFEST
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise AdapterFormatError(
                    f"{file} has format {found['format']!r}, and this version reads {FORMAT}: make the store anew with "
                    f"`molora compress`."
                )
            clusters = [
                {name: Shapes(_shape(one["U"]), _shape(one["V"])) for name, one in cluster.items()}
                for cluster in found["clusters"]
            ]
            adapters = {check_name(name, "an adapter"): Entry(**one) for name, one in found["adapters"].items()}
            for name, entry in adapters.items():
                _check_entry(name, entry, len(clusters))
            made = cls(
                str(found["base"]), int(found["basis"]), found["dtype"], float(found["most_error"]), clusters, adapters
            )
            if made.dtype not in DTYPES or made.basis < 1 or not made.most_error >= 0:
                raise ValueError(f"dtype is {made.dtype!r}, basis {made.basis}, most_error {made.most_error}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AdapterNotFoundError(
                f"There is no compressed store at {folder}: make one with `molora compress`."
            ) from error
        except AdapterFormatError:
            raise
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterFormatError(
                f"{file} is damaged ({error}): make the store anew with `molora compress`."
            ) from error
        return made


@dataclass(frozen=True)
class StoreReport:
    """What became of adapters.

    Args:
        folder: the store. clusters: how many there are.
        errors: by name, of the compressed form; of one that is kept raw what it would have had.
        raw: the names of these. bytes: see :meth:`CompressedStore.bytes`.
    """

    folder: Path
    clusters: int
    errors: Mapping[str, float]
    raw: Sequence[str]
    bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values()) - self.bytes["raw_bytes"]

    @property
    def share(self) -> float:
        """Of the bytes that there were."""
        return self.total_bytes / self.bytes["raw_bytes"]

    @property
    def median_error(self) -> float | None:
        """Of those that are not raw; None where all are."""
        return median(self._compressed) if self._compressed else None

    @property
    def worst_error(self) -> float | None:
        return max(self._compressed, default=None)

    @property
    def _compressed(self) -> list[float]:
        return [error for name, error in self.errors.items() if name not in self.raw]


def _shape(value: Any) -> tuple[int, int]:
    rows, columns = value
    if not all(isinstance(one, int) and one > 0 for one in (rows, columns)) or columns > rows:
        raise ValueError(f"a basis has shape {value}")
    return rows, columns


def _check_entry(name: str, entry: Entry, clusters: int) -> None:
    numbers = isinstance(entry.cluster, int) and math.isfinite(entry.error) and isinstance(entry.raw, bool)
    texts = isinstance(entry.sha256, str) and isinstance(entry.source_bytes, int)
    if not (numbers and texts and 0 <= entry.cluster < clusters):
        raise ValueError(f"{name} is {entry}")
