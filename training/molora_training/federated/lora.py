"""One adapter as clients and server hand it to and fro: the factors of each module at one scale, as safetensors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from molora.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter, LoRAWeights
from molora.atomic import new_folder
from molora.errors import UnsupportedAdapterError, UpdateError
from molora_training.checkpoint import save_tensors

_ENDS = ".lora_A.weight", ".lora_B.weight"
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Lora:
    """An adapter: delta of a module = scale * B A.

    pairs: by the base's module name A [rank, in] and B [out, rank], float32.
    """

    pairs: Mapping[str, Pair]
    scale: float

    @property
    def rank(self) -> int:
        """Of the module that has the highest."""
        return max(len(a) for a, _ in self.pairs.values())

    def slice(self, rank: int) -> "Lora":
        """The first ranks of it."""
        return Lora({name: (a[:rank], b[:, :rank]) for name, (a, b) in self.pairs.items()}, self.scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By PEFT's names."""
        found: dict[str, torch.Tensor] = {}
        for name, (a, b) in self.pairs.items():
            found |= {PREFIX + name + _ENDS[0]: a.contiguous(), PREFIX + name + _ENDS[1]: b.contiguous()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], scale: float) -> "Lora":
        """Of what :meth:`tensors` gave, in the order of the names: safetensors come in any, and seeds are by place."""
        names = sorted(name.removesuffix(_ENDS[0]) for name in tensors if name.endswith(_ENDS[0]))
        pairs = {name.removeprefix(PREFIX): (tensors[name + _ENDS[0]], tensors[name + _ENDS[1]]) for name in names}
        return cls(pairs, scale)

    def to_bytes(self, about: Mapping[str, Any], more: Mapping[str, torch.Tensor] | None = None) -> bytes:
        """safetensors, with ``more`` beside the factors and ``about`` as JSON among its metadata."""
        return save({**self.tensors(), **(more or {})}, {"scale": repr(self.scale), "about": json.dumps(dict(about))})

    @classmethod
    def from_folder(cls, folder: Path) -> "Lora":
        """Of a PEFT folder.

        Raises:
            AdapterError: it cannot be read. UnsupportedAdapterError: its ranks or scales differ by module.
        """
        adapter = Adapter.load(folder)
        weights = {name: one for name, one in sorted(adapter.modules.items()) if isinstance(one, LoRAWeights)}
        scales = {one.scale for one in weights.values()}
        if len(adapter.ranks) > 1 or len(scales) > 1:
            raise UnsupportedAdapterError(f"The adapter at {folder} has ranks or scales that differ by module.")
        return cls({name: (one.A.float(), one.B.float()) for name, one in weights.items()}, scales.pop())

    def save(self, out: Path, config: Mapping[str, Any]) -> None:
        """A PEFT folder with what ``config`` says of the adapter, but for its ranks and scale."""
        ranks = {name: len(a) for name, (a, _) in self.pairs.items() if len(a) != self.rank}
        own = {
            "r": self.rank,
            "lora_alpha": _whole(self.scale * self.rank),
            "rank_pattern": ranks,
            "alpha_pattern": {name: _whole(self.scale * rank) for name, rank in ranks.items()},
            "use_rslora": False,
            "inference_mode": True,
        }
        with new_folder(out) as folder:
            save_tensors(folder / WEIGHTS_FILE, self.tensors(), {"format": "pt"})
            (folder / CONFIG_FILE).write_text(json.dumps({**config, **own}, indent=2) + "\n", encoding="utf-8")


def read_bytes(message: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """Tensors, what is said about them, and their scale.

    Raises:
        UpdateError: the bytes are no safetensors that :meth:`Lora.to_bytes` wrote.
    """
    try:
        size = int.from_bytes(message[:8], "little")
        metadata = json.loads(message[8 : 8 + size])["__metadata__"]
        about, scale = json.loads(metadata["about"]), float(metadata["scale"])
        tensors = load(message)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpdateError(f"it is no safetensors with factors ({type(error).__name__})") from None
    if not isinstance(about, dict) or not math.isfinite(scale):
        raise UpdateError("what it says about itself cannot be read")
    return tensors, about, scale


def distance(one: Lora, other: Lora) -> float:
    """Frobenius norm of the difference of two adapters' deltas over all modules; their ranks may differ.

    ||B A||^2 = tr(B^T B A A^T), of the factors of both beside each other: no delta is made.
    """
    total = 0.0
    for name, (a, b) in one.pairs.items():
        a0, b0 = other.pairs[name]
        tall = torch.cat([one.scale * b.double(), -other.scale * b0.double()], 1)
        wide = torch.cat([a.double(), a0.double()])
        total += float(((tall.T @ tall) * (wide @ wide.T)).sum())
    return math.sqrt(max(total, 0.0)) if not math.isnan(total) else math.inf


def factor_distance(one: Lora, other: Lora) -> float:
    """Frobenius norm of the difference of their factors, of the same ranks, over all modules."""
    pairs = [(x, y) for name, own in one.pairs.items() for x, y in zip(own, other.pairs[name], strict=True)]
    return math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in pairs))


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
