"""Adapters that stay on the disk: each is checked once as a whole, let go of, and then read a module at a time."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molora.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter, LoRAWeights
from molora.errors import AdapterFormatError, AdapterMismatchError
from molora.stack import check_name

Sizes = Mapping[str, tuple[int, int, int]]
"""Module -> (in, out, rank)."""

OnStep = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@dataclass(frozen=True)
class Source:
    """One PEFT folder.

    Args:
        name: for messages, and in a store. path: the folder. base: as its config names it, "" where it does not.
        modules: of the base, in the order of their names. scales: of them, alpha / rank or what stands for it.
        whole: it is nothing but LoRA matrices; an adapter that brings weights of the base too is not.
        sha256: of its weights. file_bytes: of its weights and its config.
    """

    name: str
    path: Path
    base: str
    modules: Sizes
    scales: Mapping[str, float]
    whole: bool
    sha256: str
    file_bytes: int

    @classmethod
    def read(cls, name: str, path: str | Path) -> "Source":
        """Raises:
        AdapterError: the folder, or Hub id, is no adapter that MoLoRA runs.
        """
        adapter = Adapter.load(path)
        modules = dict(sorted(adapter.modules.items()))
        weights = adapter.path / WEIGHTS_FILE
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            name,
            adapter.path,
            str(adapter.config.get("base_model_name_or_path") or ""),
            {module: (pair.A.shape[1], pair.B.shape[0], pair.rank) for module, pair in modules.items()},
            {module: pair.scale for module, pair in modules.items()},
            not adapter.copies,
            digest,
            weights.stat().st_size + (adapter.path / CONFIG_FILE).stat().st_size,
        )

    def weights(self, module: str) -> LoRAWeights | None:
        """Float32; None where the adapter has none."""
        if module not in self.modules:
            return None
        ((_, found),) = self._read([module])
        return found

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], the scale in B, float32."""
        ((_, found),) = self._read([module])
        return found.A, found.B * found.scale

    def each(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every module with its factors, one at a time."""
        for module, found in self._read(self.modules):
            yield module, found.A, found.B * found.scale

    def _read(self, modules: Iterable[str]) -> Iterator[tuple[str, LoRAWeights]]:
        try:
            with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
                keys = set(file.keys())
                for module in modules:
                    start = PREFIX if f"{PREFIX}{module}.lora_A.weight" in keys else ""
                    A, B = (file.get_tensor(f"{start}{module}.lora_{half}.weight").float() for half in "AB")
                    yield module, LoRAWeights(A, B, self.scales[module])
        except (SafetensorError, OSError) as error:
            raise AdapterFormatError(f"{self.path} was changed while it was read ({error}): start again.") from error


def read_all(adapters: Mapping[str, Path], on_step: OnStep) -> tuple[list[Source], str]:
    """Adapters of one base, and its name.

    Raises:
        StackError: a name is none. AdapterMismatchError: they are of different bases. AdapterError: one cannot be read.
    """
    found: list[Source] = []
    base, sizes, kinds = "", dict[str, tuple[int, int]](), dict[tuple[object, ...], tuple[Sizes, Mapping[str, float]]]()
    for name, path in adapters.items():
        source = Source.read(check_name(name, "an adapter"), path)
        check_alike(source, base, sizes, "others are")
        base = base or source.base
        sizes |= {module: (inside, outside) for module, (inside, outside, _) in source.modules.items()}
        kind = (*source.modules.items(), *source.scales.items())
        shared = kinds.setdefault(kind, (source.modules, source.scales))  # one object for all that are alike
        found.append(replace(source, modules=shared[0], scales=shared[1]))
        on_step("read", len(found), len(adapters))
    return found, base


def check_alike(source: Source, base: str, sizes: Mapping[str, tuple[int, int]], there: str) -> None:
    """Whether an adapter is of the base of others.

    Args:
        source: the adapter. base: of the others, as far as it is known. sizes: (in, out) of the modules that are known.
        there: who they are, for messages.

    Raises:
        AdapterMismatchError: it was made for another base.
    """
    if source.base and base and short(source.base) != short(base):
        raise AdapterMismatchError(
            f"The adapter {source.name} is for {source.base}, and {there} for {base}: only adapters of one base "
            f"share a store. Give each base a store of its own."
        )
    for module, (inside, outside, _) in source.modules.items():
        known = sizes.get(module, (inside, outside))
        if known != (inside, outside):
            raise AdapterMismatchError(
                f"The adapter {source.name} maps {inside} to {outside} features in {module}, and {there} for "
                f"{known[0]} to {known[1]}: it was made for another base. Give each base a store of its own."
            )


def short(base: str) -> str:
    """A base's name without where it lies."""
    return PurePath(base).name.lower()
