"""An adapter as the modules of a model take it: made ready in any thread, so that it comes in by little work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from molora.adapter import Adapter, LoRAWeights, SharedWeights
from molora_kernels import Factors

Place = tuple[torch.device, torch.dtype, bool]
"""Where a module's factors go, in which dtype, and whether into the pages of kernels."""


@dataclass(frozen=True, eq=False)
class Flat:
    """Factors of modules of one device, dtype and shape in the host's memory: every A, then every B.

    A, B: [rank, in] and [rank, out], of each of ``names``.
    """

    values: torch.Tensor
    device: torch.device
    names: tuple[str, ...]
    A: torch.Size
    B: torch.Size

    def cut(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[names, rank, in] and [names, rank, out] of ``values``, which these or a copy of them are."""
        count = len(self.names)
        first = count * self.A.numel()
        return values[:first].view(count, *self.A), values[first:].view(count, *self.B)


@dataclass(frozen=True, eq=False)
class Packed:
    """adapter: as it was read. made_for: what has the modules that it was made ready for. factors: by module, of those
    that torch multiplies, where they are multiplied."""

    adapter: Adapter
    made_for: object
    factors: dict[str, Factors]
    flats: tuple[Flat, ...]

    @property
    def nbytes(self) -> int:
        """Of the adapter and of what was made of it."""
        parts = [*(part for pair in self.factors.values() for part in pair), *(flat.values for flat in self.flats)]
        return self.adapter.nbytes + sum(part.nbytes for part in parts)

    @property
    def flat_bytes(self) -> int:
        """Of what is copied to devices when it is put in."""
        return sum(flat.values.nbytes for flat in self.flats)

    def brought(self, copies: Sequence[torch.Tensor]) -> dict[str, Factors]:
        """Factors of all modules that have some of their own, on their devices. copies: of each flat's values."""
        found = dict(self.factors)
        for flat, values in zip(self.flats, copies, strict=True):
            found.update(zip(flat.names, map(Factors, *flat.cut(values)), strict=True))
        return found


def pack(
    adapter: Adapter,
    place: Callable[[str, bool], Place],
    part: Callable[[str, LoRAWeights], LoRAWeights],
    made_for: object,
) -> Packed:
    """Makes an adapter ready for ``made_for``. place: of a module, by its name and whether it is a core between shared
    bases. part: what this process needs of a module's factors."""
    factors: dict[str, Factors] = {}
    together: dict[tuple[Any, ...], list[tuple[str, LoRAWeights]]] = {}
    for name, weights in adapter.modules.items():
        own = weights.core if isinstance(weights, SharedWeights) else part(name, weights)
        device, dtype, kernels = place(name, isinstance(weights, SharedWeights))
        if kernels:
            alike = (device, dtype, own.A.shape, own.B.shape, own.A.dtype, own.B.dtype)
            together.setdefault(alike, []).append((name, own))
        else:
            factors[name] = ready(own, device, dtype)
    flats = [_flat(some, device, dtype) for (device, dtype, *_), some in together.items()]
    return Packed(adapter, made_for, factors, tuple(flats))


def _flat(some: Sequence[tuple[str, LoRAWeights]], device: torch.device, dtype: torch.dtype) -> Flat:
    """Of modules whose factors have the same shapes. Few calls on large tensors: with a call for each module, threads
    that read adapters would wait for each other's turn in the interpreter, and the model's steps for theirs."""
    names, weights = zip(*some, strict=True)
    A, B = weights[0].A, weights[0].B
    size = len(some) * (A.numel() + B.numel())
    flat = Flat(torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda"), device, names, A.shape, B.T.shape)
    every_A, every_B = flat.cut(flat.values)
    every_A.copy_(torch.stack([one.A for one in weights]))
    scales = torch.tensor([one.scale for one in weights], dtype=torch.float32)
    every_B.copy_((torch.stack([one.B for one in weights]).float() * scales[:, None, None]).transpose(1, 2))
    return flat


def ready(weights: LoRAWeights, device: torch.device, dtype: torch.dtype) -> Factors:
    """One module's factors, the scale multiplied into B."""
    B = (weights.B.float() * weights.scale).T
    return Factors(weights.A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous())
