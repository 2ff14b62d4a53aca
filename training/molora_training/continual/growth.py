"""Adapters that get more ranks, and fewer again: what is added to an adapter's ranks leaves the others as they were."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.atomic import new_folder
from molora.base import load_base
from molora.errors import ConfigError, UnsupportedAdapterError
from molora_training.checkpoint import save_tensors


def blank(base: str, rank: int, out: Path, seed: int = 0) -> None:
    """Writes an adapter for all linear modules of a base that does nothing yet, alpha twice its rank."""
    from peft import LoraConfig, get_peft_model

    model, _ = load_base(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with new_folder(out) as folder:
        get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)


def widen(folder: Path, ranks: int, out: Path, seed: int = 0) -> None:
    """Writes the adapter of ``folder`` with ``ranks`` more, which do nothing yet: the new rows of A are drawn as PEFT
    draws them, the new columns of B are zeros. The scale stays, so alpha grows too.

    Raises:
        AdapterError: it cannot be read. UnsupportedAdapterError: its ranks differ by module.
    """
    config, pairs = _read(folder)
    if ranks < 1:
        raise ConfigError(f"An adapter grows by one rank or more, not {ranks}.")
    generator = torch.Generator().manual_seed(seed)
    wider = {}
    for name, (a, b) in pairs.items():
        bound = 1 / math.sqrt(a.shape[1])  # of kaiming_uniform_ with a = sqrt(5)
        new = (2 * torch.rand(ranks, a.shape[1], generator=generator) - 1) * bound
        wider[name] = torch.cat([a, new.to(a)]), torch.cat([b, b.new_zeros(len(b), ranks)], 1)
    _write(out, _of_rank(config, config["r"] + ranks), wider)


def recompress(folder: Path, rank: int, out: Path) -> float:
    """Writes the nearest adapter of ``rank`` in the sense of the Frobenius norm: each module's delta cut off after its
    largest singular values (Eckart and Young).

    Returns:
        What is lost: the root of the squared sum of what was cut off over that of all, over all modules.

    Raises:
        AdapterError: it cannot be read. UnsupportedAdapterError: its ranks differ by module.
    """
    config, pairs = _read(folder)
    if not 1 <= rank <= config["r"]:
        raise ConfigError(f"An adapter of rank {config['r']} is cut to 1 to {config['r']} ranks, not {rank}.")
    narrower, lost, every = {}, 0.0, 0.0
    grown = _scale(config, rank) / _scale(config, config["r"])  # alpha stays, so each rank weighs more than before
    for name, (a, b) in pairs.items():
        # B A = Q_b R_b (Q_a R_a)^T: only the small core is decomposed.
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[:rank].sqrt()
        spare = rank - len(root)  # of a module that is narrower than the rank
        new_a, new_b = root[:, None] * (v[:rank] @ q_a.T), q_b @ u[:, :rank] * root / grown
        narrower[name] = pad(new_a, (0, 0, 0, spare)).to(a), pad(new_b, (0, spare)).to(b)
        lost, every = lost + float(s[rank:].square().sum()), every + float(s.square().sum())
    _write(out, {**config, "r": rank}, narrower)
    return math.sqrt(lost / every) if every else 0.0


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The config, and A and B of each module by the names in the file."""
    config = dict(Adapter.load(folder).config)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UnsupportedAdapterError(f"The adapter at {folder} has ranks that differ by module.")
    tensors = load_file(folder / WEIGHTS_FILE)
    ends = ".lora_A.weight", ".lora_B.weight"
    names = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    return config, {name: (tensors[name + ends[0]], tensors[name + ends[1]]) for name in names}


def _write(out: Path, config: Mapping[str, Any], pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}
    with new_folder(out) as folder:
        save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _of_rank(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The same scale with another rank."""
    alpha = config["lora_alpha"] * _scale(config, config["r"]) / _scale(config, rank)
    return {**config, "r": rank, "lora_alpha": alpha}


def _scale(config: Mapping[str, Any], rank: int) -> float:
    """What a rank weighs for each unit of alpha."""
    return 1 / math.sqrt(rank) if config.get("use_rslora") else 1 / rank
