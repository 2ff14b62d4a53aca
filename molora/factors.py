"""Low-rank factors by module: read from adapters, put together, cut to a rank, and written as a PEFT folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from molora.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter
from molora.atomic import new_folder
from molora.errors import NonFiniteError

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""The base's module name -> A [R, in] and B [out, R], the scale in B: delta(x) = B (A x)."""


def of_adapter(adapter: Adapter) -> Factors:
    """What a PEFT folder holds."""
    return {name: (weights.A, weights.B * weights.scale) for name, weights in adapter.modules.items()}


def concatenated(parts: Sequence[Factors]) -> Factors:
    """The sum of several deltas, exactly: ranks side by side."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: (
            torch.cat([part[name][0] for part in parts if name in part]),
            torch.cat([part[name][1] for part in parts if name in part], 1),
        )
        for name in names
    }


def nearest(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta of ``rank`` that is nearest to B A in the Frobenius norm (Eckart and Young); one that has less stays.

    The singular values are those of a matrix of the factors' rank: the delta itself is never made.
    """
    if len(A) <= rank:
        return A, B
    q_in, r_in = torch.linalg.qr(A.T)  # A = r_in^T q_in^T
    q_out, r_out = torch.linalg.qr(B)
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    root = values[:rank].sqrt()
    return root.unsqueeze(1) * (right[:rank] @ q_in.T), (q_out @ left[:, :rank]) * root


def cut(factors: Factors, rank: int) -> Factors:
    """The nearest deltas of ``rank``, found in float32."""
    found = {}
    for name, (A, B) in factors.items():
        near, far = nearest(A.float(), B.float(), rank)
        found[name] = near.to(A), far.to(B)
    return found


def write_factors(
    folder: Path,
    factors: Factors,
    base_name: str,
    about: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a PEFT folder, alpha being the rank. ``folder`` appears whole or not at all.

    Args:
        folder: of which there must be none.
        factors: by module.
        base_name: the base that they were made for, as its users name it.
        about: how they were made, kept beside them as ``generated.json``.
        dtype: of the weights that are written.

    Raises:
        NonFiniteError: a factor holds NaN or infinite values.
    """
    for name, pair in factors.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pair):
            raise NonFiniteError(f"The generated weights of {name} hold NaN or infinite values; nothing was written.")
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True,
        "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(factors), "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.detach().to("cpu", dtype).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.detach().to("cpu", dtype).contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as made:
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if about is not None:
            (made / "generated.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
