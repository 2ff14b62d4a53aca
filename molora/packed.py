"""An adapter as the modules of a model take it: made ready in any thread, so that it comes in by little work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from molora.adapter import Adapter, LoRAWeights, SharedWeights
from molora_kernels import Factors

Place = tuple[torch.device, torch.dtype, bool]
"""Where a module's factors go, in which dtype, and whether into the pages of kernels."""


@dataclass(frozen=True, eq=False)
class Flat:
    """Factors of modules of one device and dtype, A and B one after the other, in the host's memory."""

    values: torch.Tensor
    device: torch.device
    shapes: tuple[tuple[str, torch.Size, torch.Size], ...]  # of A and B, by module


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
            at = 0
            for name, *shapes in flat.shapes:
                parts = []
                for rank, width in shapes:
                    parts.append(values[at : at + rank * width].view(rank, width))
                    at += rank * width
                found[name] = Factors(*parts)
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
    together: dict[tuple[torch.device, torch.dtype], list[tuple[str, Factors]]] = {}
    for name, weights in adapter.modules.items():
        own = weights.core if isinstance(weights, SharedWeights) else part(name, weights)
        device, dtype, kernels = place(name, isinstance(weights, SharedWeights))
        if kernels:
            together.setdefault((device, dtype), []).append((name, ready(own, torch.device("cpu"), dtype)))
        else:
            factors[name] = ready(own, device, dtype)
    flats = []
    for (device, _), pairs in together.items():
        values = torch.cat([part.flatten() for _, pair in pairs for part in pair])
        shapes = tuple((name, pair.A.shape, pair.B.shape) for name, pair in pairs)
        flats.append(Flat(values.pin_memory() if device.type == "cuda" else values, device, shapes))
    return Packed(adapter, made_for, factors, tuple(flats))


def ready(weights: LoRAWeights, device: torch.device, dtype: torch.dtype) -> Factors:
    """One module's factors, the scale multiplied into B."""
    B = (weights.B.float() * weights.scale).T
    return Factors(weights.A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous())
