"""Adapters that stay on the disk: each is checked once, and then read a module at a time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molora.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter
from molora.errors import AdapterFormatError, AdapterMismatchError
from molora.stack import check_name

Sizes = Mapping[str, tuple[int, int]]
"""Module -> (out, in)."""

OnStep = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@dataclass(frozen=True)
class Source:
    """One PEFT folder.

    Args:
        name: in the store. path: the folder. base: as its config names it, "" where it does not.
        sizes: of its modules. scales: of its modules, alpha / rank or what stands for it.
        whole: it is nothing but LoRA matrices; an adapter that brings weights of the base too is not.
        sha256: of its weights. file_bytes: of its weights and its config.
    """

    name: str
    path: Path
    base: str
    sizes: Sizes
    scales: Mapping[str, float]
    whole: bool
    sha256: str
    file_bytes: int

    @classmethod
    def read(cls, name: str, path: str | Path) -> "Source":
        """Raises:
        StackError: the name is none. AdapterError: the folder is no adapter that MoLoRA runs.
        """
        check_name(name, "an adapter")
        adapter = Adapter.load(path)
        weights = adapter.path / WEIGHTS_FILE
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            name,
            adapter.path,
            str(adapter.config.get("base_model_name_or_path") or ""),
            {module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in adapter.modules.items()},
            {module: pair.scale for module, pair in adapter.modules.items()},
            not adapter.copies,
            digest,
            weights.stat().st_size + (adapter.path / CONFIG_FILE).stat().st_size,
        )

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], the scale in B, float32."""
        ((_, A, B),) = self._read([module])
        return A, B

    def each(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every module with its factors, one at a time."""
        return self._read(self.sizes)

    def _read(self, modules: "Sizes | list[str]") -> Iterator[tuple[str, Tensor, Tensor]]:
        try:
            with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
                keys = set(file.keys())
                for module in modules:
                    start = PREFIX if f"{PREFIX}{module}.lora_A.weight" in keys else ""
                    A, B = (file.get_tensor(f"{start}{module}.lora_{half}.weight").float() for half in "AB")
                    yield module, A, B * self.scales[module]
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
        source = Source.read(name, path)
        check_alike(source, base, sizes, "others are")
        base = base or source.base
        sizes |= source.sizes
        kind = (*source.sizes.items(), *source.scales.items())
        shared = kinds.setdefault(kind, (source.sizes, source.scales))  # one object for all that are alike
        found.append(replace(source, sizes=shared[0], scales=shared[1]))
        on_step("read", len(found), len(adapters))
    return found, base


def check_alike(source: Source, base: str, sizes: Sizes, there: str) -> None:
    """Whether an adapter is of the base of others.

    Args:
        source: the adapter. base, sizes: of the others, as far as they are known. there: who they are, for messages.

    Raises:
        AdapterMismatchError: it was made for another base.
    """
    if source.base and base and short(source.base) != short(base):
        raise AdapterMismatchError(
            f"The adapter {source.name} is for {source.base}, and {there} for {base}: only adapters of one base "
            f"share a store. Give each base a store of its own."
        )
    for module, size in source.sizes.items():
        known = sizes.get(module, size)
        if known != size:
            raise AdapterMismatchError(
                f"The adapter {source.name} maps {size[1]} to {size[0]} features in {module}, and {there} for "
                f"{known[1]} to {known[0]}: it was made for another base. Give each base a store of its own."
            )


def short(base: str) -> str:
    """A base's name without where it lies."""
    return PurePath(base).name.lower()
