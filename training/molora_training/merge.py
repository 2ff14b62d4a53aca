"""Several adapters merged into one, by PEFT: what routing has to be better than.

TIES (arXiv 2306.01708), DARE (2311.03099), magnitude pruning, a weighted sum of the factors (linear) or of the products
(cat: exact, of the sum of the ranks; svd: cut to a rank). Adapters of different ranks need a way that ends in _svd.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel

from molora.adapter import Adapter
from molora.errors import ConfigError

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
_PRUNES = ("ties", "dare", "magnitude")


def merge(
    base: Any,
    adapters: Mapping[str, Path],
    out: Path,
    method: Method = "ties",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes the merged adapter, a PEFT folder, to ``out``, whole or not at all; returns ``out``.

    Args:
        base: the loaded base; it is as before afterwards.
        adapters: name -> PEFT folder.
        method: how.
        weights: of the adapters in their order; None: equal ones that sum to 1.
        density: share of the numbers that pruning keeps.
        rank: of what ends in svd; None: the largest of the adapters'.
        seed: of DARE's random choice.

    Raises:
        ConfigError: an unknown method, other than two or more adapters, weights of another number, or adapters of
            different ranks with a method that wants one.
    """
    if method not in get_args(Method):
        raise ConfigError(f"There is no merge '{method}': choose from {', '.join(get_args(Method))}.")
    if len(adapters) < 2:
        raise ConfigError(f"A merge needs two adapters or more, not {len(adapters)}.")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(shares) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many weights, not {len(shares)}.")
    ranks = {name: Adapter.load(folder).ranks for name, folder in adapters.items()}
    if len({rank for own in ranks.values() for rank in own}) > 1 and method != "cat" and not method.endswith("svd"):
        shown = ", ".join(f"{name} has {' and '.join(map(str, own))}" for name, own in ranks.items())
        raise ConfigError(f"'{method}' needs adapters of one rank ({shown}): use '{method}_svd'.")
    names = [f"merged_{index}" for index in range(len(adapters))]  # a name may hold what PEFT does not take
    torch.manual_seed(seed)
    model: Any = None
    try:
        for name, folder in zip(names, adapters.values(), strict=True):
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        pruned = {"density": density} if method.startswith(_PRUNES) else {}
        cut = {"svd_rank": rank} if method.endswith("svd") else {}
        model.add_weighted_adapter(names, shares, "merge", combination_type=method, **pruned, **cut)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as draft:
            model.save_pretrained(draft, selected_adapters=["merge"])
            shutil.rmtree(out, ignore_errors=True)
            os.replace(Path(draft) / "merge", out)
    finally:
        if model is not None:
            model.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config
    return out
