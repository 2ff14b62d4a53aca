"""LoRA adapters merged into one PEFT folder, module by module, without their base."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from molora.adapter import WEIGHTS_FILE, LoRAWeights
from molora.compose.methods import OF_FACTORS, Method, merged, weighted_sum
from molora.compose.source import Source, short
from molora.errors import AdapterError, AdapterMismatchError, ConfigError, NonFiniteError
from molora.factors import write_factors

_CANCELLED = 1e-14  # of the factors' norms: a sum below is what rounding leaves of deltas that cancel


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how far it is from the weighted sum of the deltas. Mappings are by module, but for one.

    norms: Frobenius norms of the difference, as it is written, and of the sum. filled: by adapter the modules that it
    lacks, where it counted as zero. bytes: of the weights' file. left_out: adapters that bring weights of the base too,
    as PEFT writes them beside LoRA on a head: those are not merged, and MoLoRA runs such an adapter only on a base that
    has the same.
    """

    folder: Path
    method: Method
    norms: Mapping[str, tuple[float, float]]
    ranks: Mapping[str, int]
    filled: Mapping[str, list[str]]
    seconds: float
    bytes: int
    left_out: Sequence[str] = ()

    @property
    def errors(self) -> dict[str, float]:
        """|difference| / |sum|."""
        return {module: _ratio(*norms) for module, norms in self.norms.items()}

    @property
    def error(self) -> float:
        """The same over all modules together."""
        return _ratio(*(math.hypot(*sides) for sides in zip(*self.norms.values(), strict=True)))


def merge(
    adapters: Mapping[str, str | Path],
    out: Path,
    method: Method = "cat",
    *,
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    at_once: int = 1,
    on_module: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Writes one adapter that stands for several, a PEFT folder, whole or not at all.

    Of the sources ``at_once`` modules are in memory at a time, after each was checked as a whole.

    Args:
        adapters: name -> PEFT folder or Hub id.
        out: a folder that does not exist.
        method: see :mod:`molora.compose.methods`.
        weights: of the adapters in their order, negative ones too; None: equal ones that sum to 1.
        density: share of the numbers that ties, dare, magnitude_prune and knots keep.
        rank: of svd, what ends in _svd (None: in each module the largest of the adapters') and knots (None: all).
        seed: of DARE's random choice; a module's does not depend on the others.
        dtype: of the weights that are written.
        at_once: how many modules are made side by side, on as many threads.
        on_module: is told how many modules are done, and of how many.

    Raises:
        ConfigError: the settings do not fit each other or the adapters. AdapterMismatchError: the adapters were made
            for different bases. AdapterError: one cannot be used, or ``out`` exists. NonFiniteError: the result is not
            finite.
    """
    started = perf_counter()
    shares = [1 / len(adapters)] * len(adapters) if weights is None and adapters else list(weights or ())
    _check_settings(len(adapters), shares, method, density, rank)
    if out.exists():
        raise AdapterError(f"{out} exists already: choose another folder.")
    sources = {name: Source.read(name, path) for name, path in adapters.items()}
    base = _check_sources(sources, method)
    modules = list(dict.fromkeys(module for source in sources.values() for module in source.modules))
    make = partial(merged, method=method, density=density, rank=rank)
    factors, norms = {}, {}
    with _side_by_side(at_once) as each:
        # A call, so that nothing of a module is held when the next one is read.
        made = each(lambda module: _one(sources.values(), module, shares, make, seed, dtype), modules)
        for done, (module, one) in enumerate(zip(modules, made, strict=True), 1):
            factors[module], norms[module] = one
            if on_module is not None:
                on_module(done, len(modules))
    about = {
        "made_from": "merge", "method": method, "density": density, "rank": rank, "seed": seed,
        "adapters": [
            {"name": PurePath(name).name, "weight": share} for name, share in zip(sources, shares, strict=True)
        ],
    }  # fmt: skip
    write_factors(out, factors, base, about, dtype)
    lacking = {name: [module for module in modules if module not in source.modules] for name, source in sources.items()}
    return MergeReport(
        out,
        method,
        norms,
        {module: len(A) for module, (A, _) in factors.items()},
        {name: own for name, own in lacking.items() if own},
        perf_counter() - started,
        (out / WEIGHTS_FILE).stat().st_size,
        [name for name, source in sources.items() if not source.whole],
    )


@contextmanager
def _side_by_side(threads: int) -> Iterator[Callable[..., Iterable]]:
    """A ``map`` that runs so many calls at a time; torch's own threads are shared out among them."""
    if threads == 1:
        yield map
        return
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, max(1, own // threads)))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own)  # or threads that others begin later would have as few


def _one(
    sources: Iterable[Source],
    module: str,
    weights: Sequence[float],
    make: Callable[..., tuple[Tensor, Tensor]],
    seed: int,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """A module's factors as they are written, and the norms of :class:`MergeReport`.

    Raises:
        NonFiniteError: its sum is not finite.
    """
    read = [(source.weights(module), weight) for source, weight in zip(sources, weights, strict=True)]
    present = [(part, weight) for part, weight in read if part is not None]
    parts, own = [part for part, _ in present], [weight for _, weight in present]
    reach = max(max(abs(weight), abs(part.scale), abs(weight * part.scale)) for part, weight in present)
    try:
        if reach > torch.finfo(torch.float32).max:
            raise OverflowError(f"a factor of {reach:g}")
        A, B = make(parts, own, seed=_seed(seed, module))
    except (torch.linalg.LinAlgError, OverflowError) as error:
        raise NonFiniteError(f"What is merged for {module} is not finite ({error}); nothing was written.") from error
    A, B = A.to(dtype), B.to(dtype)
    return (A, B), _norms(parts, own, A, B)


def _check_settings(count: int, weights: Sequence[float], method: str, density: float, rank: int | None) -> None:
    """Raises:
    ConfigError: one of them is out of range.
    """
    if method not in get_args(Method):
        raise ConfigError(f"There is no merge {method!r}: choose from {', '.join(get_args(Method))}.")
    if count < 2:
        raise ConfigError(f"A merge needs two adapters or more, not {count}.")
    if len(weights) != count:
        raise ConfigError(f"{count} adapters need as many weights, not {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ConfigError(f"Weights are finite numbers, and not all of them 0; these are {_listed(weights)}.")
    if not 0 < density <= 1:
        raise ConfigError(f"The density is the share of numbers to keep, above 0 and up to 1, not {density}.")
    if rank is not None and rank < 1:
        raise ConfigError(f"A rank is 1 or more, not {rank}.")
    if rank is not None and method in ("cat", *OF_FACTORS):
        raise ConfigError(f"The rank of {method!r} follows from the adapters': to choose one use {_cut(method)!r}.")


def _check_sources(sources: Mapping[str, Source], method: str) -> str:
    """The name of their base, "" where none names it.

    Raises:
        AdapterMismatchError: they have different ones. ConfigError: their ranks do not fit the method.
    """
    base, namer = "", ""
    seen: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, source in sources.items():
        if base and source.base and short(base) != short(source.base):
            raise AdapterMismatchError(
                f"The adapters are for different bases: {namer} for {base}, and {name} for {source.base}."
            )
        base, namer = (base, namer) if base else (source.base, name)
        for module, (inputs, outputs, rank) in source.modules.items():
            other, (other_inputs, other_outputs, other_rank) = seen.setdefault(module, (name, source.modules[module]))
            if (inputs, outputs) != (other_inputs, other_outputs):
                raise AdapterMismatchError(
                    f"The adapters are for different bases: {other} maps {other_inputs} to {other_outputs} features in "
                    f"{module}, and {name} {inputs} to {outputs}."
                )
            if method in OF_FACTORS and rank != other_rank:
                raise ConfigError(
                    f"{method!r} needs adapters of one rank, and in {module} {other} has {other_rank} and {name} "
                    f"{rank}: use {_cut(method)!r}."
                )
    return base


def _norms(parts: Sequence[LoRAWeights], weights: Sequence[float], A: Tensor, B: Tensor) -> tuple[float, float]:
    """Frobenius norms of B A minus the weighted sum, and of the sum, by the triangles of the factors, in float64."""
    all_A, all_B = weighted_sum(parts, weights)
    size = len(all_A)
    r_in = torch.linalg.qr(torch.cat([all_A, A.double()]).T, mode="r").R
    r_out = torch.linalg.qr(torch.cat([all_B, -B.double()], 1), mode="r").R
    difference, whole = float((r_out @ r_in.T).norm()), float((r_out[:, :size] @ r_in[:, :size].T).norm())
    most = float(r_out.norm() * r_in.norm())
    if whole > _CANCELLED * most:
        return difference, whole
    return (difference if difference > torch.finfo(torch.float32).eps * most else 0.0), 0.0


def _ratio(difference: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / whole


def _seed(seed: int, module: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:7], "big")


def _cut(method: str) -> str:
    """The way to the same at any rank."""
    return "svd" if method in ("cat", "linear") else f"{method}_svd"


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
