"""The files of a compressed store: of each cluster its bases, of each adapter its cores, or its PEFT folder."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from molora.atomic import new_folder, remove_folder
from molora.compose.joint import Basis, halves, lost, squared
from molora.compose.manifest import MANIFEST, Entry
from molora.compose.source import Source
from molora.errors import AdapterFormatError, NonFiniteError
from molora.saved import copy_adapter

Shape = tuple[int | None, int | None]

BASES, CORES, RAW = "bases", "cores", "raw"
SUFFIX = ".safetensors"


def cores_of(source: Source, bases: Mapping[str, Basis], dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """An adapter's cores, rounded to ``dtype``, and the error of all that they give back.

    A module that has no basis is lost.
    """
    cores: dict[str, Tensor] = {}
    gone, whole = 0.0, 0.0
    for module, A, B in source.each():
        own = squared(A, B)
        whole += own
        if module in bases:
            a, b = (half.to(dtype) for half in halves(bases[module], A, B))
            cores |= {f"a/{module}": a, f"b/{module}": b}
            own = lost(bases[module], b.double() @ a.double(), A, B)
        gone += own
    return cores, (gone / whole) ** 0.5 if whole else 0.0


def keep(folder: Path, source: Source, cluster: int, cores: Mapping[str, Tensor], error: float, most: float) -> Entry:
    """Writes an adapter's cores to the store ``folder``, or the adapter itself where they lose more than ``most``."""
    raw = error > most or not cores or not source.whole
    place, file = folder / RAW / source.name, folder / CORES / f"{source.name}{SUFFIX}"
    if place.is_dir():  # an interruption left it, or it was too far from other bases
        remove_folder(place)
    if raw:
        file.unlink(missing_ok=True)
        with new_folder(place) as made:
            copy_adapter(source.path, made)
    else:
        write_tensors(file, cores)
    return Entry(cluster, error, raw, source.sha256, source.file_bytes)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file and waits until the disk has it."""
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        opened.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))
        opened.flush()
        os.fsync(opened.fileno())


def read_tensors(file: Path, shapes: Mapping[str, Shape], some: bool = False) -> dict[str, Tensor]:
    """A file of a store, in float32.

    Args:
        shapes: of its tensors, None for what is free. some: it may lack any of them.

    Raises:
        AdapterFormatError: it is missing or damaged, or its tensors are not of these shapes. NonFiniteError: they hold
        NaN or infinite values.
    """
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFormatError(
            f"{file} is missing or damaged ({error}): make the store anew with `molora compress`."
        ) from error
    own = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [
        name for name in (own if some else own.keys() | shapes.keys()) if not _fits(own.get(name), shapes.get(name))
    ]
    if wrong:
        name = min(wrong)
        raise AdapterFormatError(
            f"{file} holds {name} of shape {own.get(name)}, and {MANIFEST} says {shapes.get(name)}: the store is "
            f"damaged. Make it anew with `molora compress`."
        )
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise NonFiniteError(f"{file} holds NaN or infinite values, or whole numbers: the store is damaged.")
    return {name: tensor.float() for name, tensor in found.items()}


def _fits(found: tuple[int, ...] | None, wanted: Shape | None) -> bool:
    if found is None or wanted is None or len(found) != 2:
        return False
    return all(size is None or size == own for own, size in zip(found, wanted, strict=True))
