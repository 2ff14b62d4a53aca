"""The factors of one adapter as clients and server hand them to and fro: A and B of each module at one scale."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.atomic import new_folder
from molora.errors import UnsupportedAdapterError, UpdateError
from molora_training.checkpoint import save_tensors

ENDS = ".lora_A.weight", ".lora_B.weight"
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """An adapter: delta of a module = scale * B A.

    pairs: by the module's name in PEFT's file, A [rank, in] and B [out, rank], float32; each module of the same rank.
    """

    pairs: Mapping[str, Pair]
    scale: float

    @property
    def rank(self) -> int:
        return len(next(iter(self.pairs.values()))[0])

    def slice(self, rank: int) -> "Factors":
        """The first ranks of it."""
        return Factors({name: (a[:rank], b[:, :rank]) for name, (a, b) in self.pairs.items()}, self.scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By PEFT's names."""
        found: dict[str, torch.Tensor] = {}
        for name, (a, b) in self.pairs.items():
            found |= {name + ENDS[0]: a.contiguous(), name + ENDS[1]: b.contiguous()}
        return found

    def to_bytes(self, about: Mapping[str, Any]) -> bytes:
        """safetensors, with ``about`` as JSON among its metadata."""
        return save(self.tensors(), {"scale": repr(self.scale), "about": json.dumps(dict(about))})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], scale: float) -> "Factors":
        """Of what :meth:`tensors` gave."""
        names = [name.removesuffix(ENDS[0]) for name in tensors if name.endswith(ENDS[0])]
        return cls({name: (tensors[name + ENDS[0]], tensors[name + ENDS[1]]) for name in names}, scale)

    @classmethod
    def from_folder(cls, folder: Path) -> "Factors":
        """Of a PEFT folder.

        Raises:
            AdapterError: it cannot be read. UnsupportedAdapterError: its ranks or scales differ by module.
        """
        adapter = Adapter.load(folder)
        scales = {weights.scale for weights in adapter.modules.values()}
        if len(adapter.ranks) > 1 or len(scales) > 1:
            raise UnsupportedAdapterError(f"The adapter at {folder} has ranks or scales that differ by module.")
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
        return cls.from_tensors(tensors, scales.pop())

    def save(self, out: Path, config: Mapping[str, Any]) -> None:
        """A PEFT folder with what ``config`` says of the adapter, but for its rank and scale."""
        alpha = self.scale * self.rank
        own = {**config, "r": self.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        with new_folder(out) as folder:
            save_tensors(folder / WEIGHTS_FILE, self.tensors(), {"format": "pt"})
            (folder / CONFIG_FILE).write_text(
                json.dumps({**own, "use_rslora": False}, indent=2) + "\n", encoding="utf-8"
            )


def read_bytes(message: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """Tensors, what is said about them, and their scale.

    Raises:
        UpdateError: the bytes are no safetensors that :meth:`Factors.to_bytes` wrote.
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


def distance(one: Factors, other: Factors) -> float:
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
