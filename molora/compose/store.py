"""Many adapters of one base in the room of few, on disk (arXiv 2407.00066).

<store>/store.json                    what there is
<store>/bases/<cluster>.safetensors   U/<module> [out, c] and V/<module> [in, c]
<store>/cores/<name>.safetensors      a/<module> [r, c] and b/<module> [c, r]: what an adapter has of its own
<store>/raw/<name>/                   a PEFT folder: an adapter that is too far from every basis
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from filelock import FileLock

from molora.adapter import Adapter, SharedWeights
from molora.atomic import new_folder, remove_folder, write_text
from molora.compose.cluster import group, sketch
from molora.compose.joint import Basis, fit
from molora.compose.manifest import DTYPES, MANIFEST, Entry, Manifest, Shapes, StoreReport
from molora.compose.parts import BASES, CORES, RAW, SUFFIX, Shape, cores_of, keep, read_tensors, write_tensors
from molora.compose.source import OnStep, Source, check_alike, read_all
from molora.errors import AdapterFormatError, AdapterNotFoundError, ConfigError, StackError
from molora.factors import Factors, of_adapter, write_factors
from molora.saved import copy_adapter
from molora.stack import check_name

_LOCK = ".molora.lock"


def compress(
    adapters: Mapping[str, Path],
    out: Path,
    *,
    basis: int = 64,
    clusters: int = 1,
    most_error: float = 0.3,
    rounds: int = 10,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> StoreReport:
    """Writes a store, whole or not at all. One adapter's weights, or one module's, are in memory at a time.

    Args:
        adapters: name -> PEFT folder, all of one base; of any rank and any modules.
        out: the store, of which there must be none.
        basis: the most columns of U and of V.
        clusters: the most groups, each with bases of its own; their signatures take 288 bytes a module and adapter.
        most_error: what an adapter may lose, ||Delta - U S V^T|| / ||Delta|| over all its modules. One that would lose
            more is kept as it came, and so is one that brings weights of the base's own; then the bases are fitted
            again, without those.
        rounds: the most of each fit.
        dtype: of bases and cores, float32 or bfloat16; the errors are those of the rounded ones.
        seed: of the grouping.
        on_step: hears of the progress.

    Raises:
        ConfigError: a setting is out of range, or ``out`` exists. StackError: a name is none. AdapterMismatchError:
        the adapters are of different bases. AdapterError: one cannot be read.
    """
    step = on_step or (lambda *_: None)
    out = Path(out)
    kind = _check_settings(len(adapters), out, basis, clusters, most_error, rounds, dtype)
    sources, base = read_all(adapters, step)
    groups = _groups(sources, clusters, seed)
    entries: dict[str, Entry] = {}
    shapes: list[dict[str, Shapes]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as made:
        for number, members in enumerate(groups):
            bases = _fit(members, basis, rounds, dtype, partial(step, f"bases{_of(number, groups)}"))
            found = _keep(made, number, members, bases, dtype, most_error, step)
            near = [source for source in members if not found[source.name].raw]
            if 0 < len(near) < len(members):  # those that are kept raw had their say, and need no bases
                bases = _fit(near, basis, rounds, dtype, partial(step, f"bases of those near{_of(number, groups)}"))
                found = _keep(made, number, members, bases, dtype, most_error, step)
            entries |= found
            shapes.append({module: Shapes(_shape(one.U), _shape(one.V)) for module, one in bases.items()})
            tensors = {f"U/{module}": one.U.to(dtype) for module, one in bases.items()}
            tensors |= {f"V/{module}": one.V.to(dtype) for module, one in bases.items()}
            write_tensors(made / BASES / f"{number}{SUFFIX}", tensors)
        entries = {source.name: entries[source.name] for source in sources}
        manifest = Manifest(base, basis, kind, most_error, shapes, entries)
        write_text(made / MANIFEST, manifest.to_json())
    store = CompressedStore(out, manifest)
    errors = {name: entry.error for name, entry in entries.items()}
    return StoreReport(out, len(groups), errors, store.raw, store.bytes())


class CompressedStore:
    """What :func:`compress` wrote. Bases are read when they are first needed, and stay.

    Args:
        folder: the store. manifest: its store.json.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._read: dict[int, Mapping[str, Basis]] = {}

    @classmethod
    def load(cls, folder: str | Path) -> "CompressedStore":
        """Raises:
        AdapterNotFoundError: there is no store. AdapterFormatError: its store.json is damaged.
        """
        folder = Path(folder).expanduser()
        return cls(folder, Manifest.read(folder))

    @property
    def names(self) -> list[str]:
        return list(self.manifest.adapters)

    @property
    def raw(self) -> list[str]:
        """Those that are kept as they came, and so given back exactly."""
        return [name for name, entry in self.manifest.adapters.items() if entry.raw]

    def error(self, name: str) -> float:
        """What the compressed form loses, ||Delta - U S V^T|| / ||Delta||; of one that is kept raw, why it is."""
        return self._entry(name).error

    def factors(self, name: str) -> Factors:
        """An adapter as factors of its own rank: a V^T [r, in] and U b [out, r]; a raw one's as they came.

        Raises:
            AdapterNotFoundError: there is none of that name. AdapterFormatError: its files are damaged.
        """
        entry = self._entry(name)
        if entry.raw:
            return of_adapter(Adapter.load(self.folder / RAW / name))
        bases = self.bases(entry.cluster)
        return {m: (a @ bases[m].V.T, bases[m].U @ b) for m, (a, b) in self._halves(name, entry.cluster).items()}

    def adapter(self, name: str) -> Adapter:
        """An adapter in its compressed form, for a model to run: its weights are its core, what it shares is there once
        for all; a raw one's as they came.

        Raises:
            AdapterNotFoundError: there is none of that name. AdapterFormatError: its files are damaged.
        """
        entry = self._entry(name)
        if entry.raw:
            return Adapter.load(self.path(name))
        bases, dtype = self.bases(entry.cluster), DTYPES[self.manifest.dtype]
        modules = {
            module: SharedWeights(bases[module], a.to(dtype), b.to(dtype))
            for module, (a, b) in self._halves(name, entry.cluster).items()
        }
        return Adapter(self.path(name), modules, {"base_model_name_or_path": self.manifest.base})

    def path(self, name: str) -> Path:
        """By which a stack names an adapter.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        return self.folder / RAW / name if self._entry(name).raw else self.folder / CORES / f"{name}{SUFFIX}"

    def _halves(self, name: str, cluster: int) -> Factors:
        """a [r, c] and b [c, r], by module."""
        shapes: dict[str, Shape] = {}
        for module, one in self.manifest.clusters[cluster].items():
            shapes |= {f"a/{module}": (None, one.V[1]), f"b/{module}": (one.U[1], None)}
        file = self.folder / CORES / f"{name}{SUFFIX}"
        found = read_tensors(file, shapes, some=True)
        modules = {key.partition("/")[2] for key in found}
        wrong = [
            m
            for m in modules
            if {f"a/{m}", f"b/{m}"} - found.keys() or len(found[f"a/{m}"]) != found[f"b/{m}"].shape[1]
        ]
        if wrong:
            raise AdapterFormatError(
                f"{file} has no whole core of {min(wrong)}: the store is damaged. Make it anew with `molora compress`."
            )
        return {module: (found[f"a/{module}"], found[f"b/{module}"]) for module in sorted(modules)}

    def bases(self, cluster: int) -> Mapping[str, Basis]:
        """A cluster's, by module.

        Raises:
            AdapterFormatError: their file is damaged.
        """
        file = self.folder / BASES / f"{cluster}{SUFFIX}"
        if cluster not in self._read:
            self._read[cluster] = _bases(file.resolve(), _changed(file), tuple(self.manifest.clusters[cluster].items()))
        return self._read[cluster]

    def add(self, name: str, path: str | Path) -> float:
        """Takes an adapter in, by the bases that are there; no other's file changes.

        Returns:
            Its error with the nearest cluster's; it is kept raw where that is above the store's ``most_error``.

        Raises:
            StackError: the name is none, or there is one of that name. AdapterMismatchError: it is of another base.
            AdapterError: it cannot be read.
        """
        source = Source.read(check_name(name, "an adapter"), path)
        with self._locked():
            manifest = self.manifest
            if name in manifest.adapters:
                raise StackError(f"The store has an adapter {name}: remove it first, or choose another name.")
            check_alike(source, manifest.base, manifest.sizes, "the store is")
            dtype = DTYPES[manifest.dtype]
            found = [cores_of(source, self.bases(number), dtype) for number in range(len(manifest.clusters))]
            number = min(range(len(found)), key=lambda one: found[one][1])
            entry = keep(self.folder, source, number, *found[number], manifest.most_error)
            self._write({**manifest.adapters, name: entry})
        return entry.error

    def remove(self, name: str) -> None:
        """Takes an adapter out; the bases stay as they are.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        with self._locked():
            entry = self._entry(name)
            self._write({other: one for other, one in self.manifest.adapters.items() if other != name})
            if not entry.raw:
                (self.folder / CORES / f"{name}{SUFFIX}").unlink(missing_ok=True)
            elif (self.folder / RAW / name).is_dir():
                remove_folder(self.folder / RAW / name)

    def export(self, name: str, out: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes an ordinary PEFT folder, of which there must be none: of its own rank, or a raw one as it came.

        Args:
            dtype: of the weights, unless it is raw; None: the store's.

        Raises:
            AdapterNotFoundError: there is none of that name. AdapterFormatError: its files are damaged. ConfigError:
            ``out`` exists.
        """
        out, entry = Path(out), self._entry(name)
        if out.exists():
            raise ConfigError(f"{out} exists: nothing was written. Choose another folder.")
        factors = self.factors(name)
        if entry.raw:
            out.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(out) as made:
                copy_adapter(self.folder / RAW / name, made)
            return
        about = {"made_from": "a compressed store", "error": entry.error, "sha256": entry.sha256}
        write_factors(out, factors, self.manifest.base, about, dtype or DTYPES[self.manifest.dtype])

    def bytes(self) -> dict[str, int]:
        """On disk, by kind; ``raw_bytes`` is what the adapters' own weights and configs took."""
        found = {MANIFEST: (self.folder / MANIFEST).stat().st_size}
        for part in (BASES, CORES, RAW):
            files = (self.folder / part).rglob("*")
            found[part] = sum(file.stat().st_size for file in files if file.is_file())
        return {**found, "raw_bytes": sum(entry.source_bytes for entry in self.manifest.adapters.values())}

    def _entry(self, name: str) -> Entry:
        if name not in self.manifest.adapters:
            some = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
            raise AdapterNotFoundError(f"The store {self.folder} has no adapter {name!r}; it has: {some or 'none'}.")
        return self.manifest.adapters[name]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, who knows what the others wrote."""
        with FileLock(self.folder / _LOCK):
            self.manifest = Manifest.read(self.folder)
            yield

    def _write(self, adapters: Mapping[str, Entry]) -> None:
        manifest = replace(self.manifest, adapters=adapters)
        write_text(self.folder / MANIFEST, manifest.to_json())
        self.manifest = manifest


def _check_settings(
    adapters: int, out: Path, basis: int, clusters: int, most_error: float, rounds: int, dtype: torch.dtype
) -> str:
    """The name of ``dtype``."""
    kinds = [name for name, own in DTYPES.items() if own == dtype]
    wrong = {
        "There are no adapters to compress: give at least one": not adapters,
        f"The basis has at least 1 direction, not {basis}": basis < 1,
        f"{adapters} adapters can be in 1 to {adapters} clusters, not in {clusters}": not 1 <= clusters <= adapters,
        f"The most error is 0 or more, such as 0.3, not {most_error}": not most_error >= 0,
        f"A basis is found in at least 1 round, not {rounds}": rounds < 1,
        f"A store is in {' or '.join(DTYPES)}, not in {dtype}": not kinds,
        f"{out} exists: choose another folder": out.exists(),
    }
    for sentence, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"{sentence}. Nothing was written.")
    return kinds[0]


def _groups(sources: Sequence[Source], clusters: int, seed: int) -> list[list[Source]]:
    if clusters == 1:
        return [list(sources)]
    modules = sorted({module for source in sources for module in source.modules})
    parts = [
        sketch(module, (source.factors(module) if module in source.modules else None for source in sources), seed)
        for module in modules
    ]
    labels = group(torch.cat(parts, 1), clusters, seed)
    return [
        [source for source, own in zip(sources, labels, strict=True) if own == label]
        for label in range(max(labels) + 1)
    ]


def _fit(
    members: Sequence[Source], size: int, rounds: int, dtype: torch.dtype, step: Callable[[int, int], None]
) -> dict[str, Basis]:
    """By module, each of those that have it, as it is after rounding."""
    modules = sorted({module for source in members for module in source.modules})
    bases = {}
    for module in modules:
        own = [source for source in members if module in source.modules]
        found = fit(lambda module=module, own=own: (source.factors(module) for source in own), size, rounds)  # type: ignore[misc]
        bases[module] = Basis(found.U.to(dtype).float(), found.V.to(dtype).float())
        step(len(bases), len(modules))
    return bases


def _keep(
    folder: Path,
    number: int,
    members: Sequence[Source],
    bases: Mapping[str, Basis],
    dtype: torch.dtype,
    most_error: float,
    step: OnStep,
) -> dict[str, Entry]:
    """Writes a cluster's adapters."""
    entries = {}
    for done, source in enumerate(members, 1):
        entries[source.name] = keep(folder, source, number, *cores_of(source, bases, dtype), most_error)
        step("adapters", done, len(members))
    return entries


def _of(number: int, groups: Sequence[object]) -> str:
    return "" if len(groups) == 1 else f", cluster {number + 1} of {len(groups)}"


@lru_cache(maxsize=8)
def _bases(file: Path, changed: int, shapes: tuple[tuple[str, Shapes], ...]) -> Mapping[str, Basis]:
    """The same ones for all that read the file, so that a model holds them once."""
    wanted: dict[str, Shape] = {}
    for module, one in shapes:
        wanted |= {f"U/{module}": one.U, f"V/{module}": one.V}
    found = read_tensors(file, wanted)
    return {module: Basis(found[f"U/{module}"], found[f"V/{module}"]) for module, _ in shapes}


def _changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
