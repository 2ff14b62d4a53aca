"""A saved MoLoRA as one LoRA folder that vLLM loads: all adapters' ranks side by side, the router beside them."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from molora import saved
from molora.adapter import CONFIG_FILE, Adapter
from molora.base import load_base
from molora.checks import check_fits, check_router
from molora.errors import ConfigError, SelectionError, UnsupportedAdapterError
from molora.factors import Factors, write_factors
from molora.loading import load_adapter
from molora.router import Router
from molora.selection import Selection
from molora.stack import Stack
from molora.vllm.folder import FORMAT, MANIFEST, TABLE
from molora.vllm.selections import Selections
from molora.vocabulary import VocabularyRouter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""
_NOT_RUN = ("lm_head", "embed_tokens", "wte")


def export(
    folder: str | Path,
    out: str | Path,
    selection: Selection | None = None,
    *,
    name: str | None = None,
    base: PreTrainedModel | None = None,
) -> Path:
    """Writes ``<out>/<name>-<hash of the content>``: what vLLM knows an adapter by for its prefix cache is its name and
    path, so other content must have another name.

    Args:
        folder: a saved MoLoRA, or its Hub id.
        out: where the new folder is put.
        selection: under which requests for it run that bring none; layers left out have their default.
        name: of the stack; by default that of ``folder``.
        base: whose embeddings the router reads; by default the one that ``folder`` names is loaded.

    Raises:
        UnsupportedAdapterError: an adapter of the head or an embedding, or more ranks than vLLM takes.
        ConfigError: there are no adapters.
        SelectionError, StackError, AdapterError, RouterError, BaseModelError: the folder or the selection cannot be
            used.
    """
    parts = saved.load(folder)
    labels = [(layer.name, adapter) for layer in parts.stack.layers for adapter in layer.adapters]
    adapters = [load_adapter(parts.stack[layer].adapters[adapter]) for layer, adapter in labels]
    if not labels:
        raise ConfigError("This stack has no adapters: there is nothing to export.")
    for label, adapter in zip(parts.stack.names, adapters, strict=True):
        _check_adapter(label, adapter)
    if not isinstance(selection or {}, Mapping):
        raise SelectionError("A folder has one selection, of which a request may have another: give one, not a list.")
    Selections({"stack": _named(parts.stack), "selection": selection, "router": parts.router}).resolve(None)
    if base is None:
        base, _ = load_base(parts.base, dtype=torch.float32)
    for adapter in adapters:
        check_fits(adapter, base, parts.base, backend="torch")
    if parts.router is not None:
        check_router(parts.router, parts.stack, base)
    ranks = [max(adapter.ranks) for adapter in adapters]
    firsts = [sum(ranks[:place]) for place in range(len(ranks))]
    rank = padded(sum(ranks))
    manifest: dict[str, object] = {
        "format": FORMAT,
        "base": parts.base,
        "rank": rank,
        "stack": _named(parts.stack),
        "selection": selection,
        "columns": [
            {"layer": layer, "adapter": adapter, "first": first, "count": count}
            for (layer, adapter), first, count in zip(labels, firsts, ranks, strict=True)
        ],
    }
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".exporting-") as scratch:
        made = Path(scratch) / "made"
        write_factors(made, joined(adapters, firsts, rank), parts.base, dtype=torch.float32)
        _lock(made / CONFIG_FILE)
        manifest["router"] = _save_router(parts.router, base, made)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        target = place / f"{name or Path(folder).name}-{content_hash(made)}"
        if not target.exists():  # the same name is the same content
            made.rename(target)
    return target


def joined(adapters: Sequence[Adapter], firsts: Sequence[int], rank: int) -> Factors:
    """All adapters as one: its B diag(g) A is the sum of g_k s_k B_k A_k, where adapter k has the columns of B, and the
    rows of A, from firsts[k] on. The same columns in every module, so that one row of gates serves them all; what an
    adapter does not adapt, or adapts at a lower rank, is zero there."""
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for adapter, first in zip(adapters, firsts, strict=True):
        for module, own in adapter.modules.items():
            if module not in made:
                made[module] = (torch.zeros(rank, own.A.shape[1]), torch.zeros(own.B.shape[0], rank))
            A, B = made[module]
            A[first : first + own.rank] = own.A.float()
            B[:, first : first + own.rank] = own.B.float() * own.scale
    return made


def padded(rank: int) -> int:
    """The least rank of vLLM's that holds ``rank``."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UnsupportedAdapterError(
        f"The adapters have {rank} ranks together, and vLLM takes {RANKS[-1]}: compress or merge some "
        f"(`molora compress`, `molora merge`)."
    )


def content_hash(folder: Path) -> str:
    """12 hexadecimal digits of sha256 over the names and bytes of a folder's files."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        found.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as source:
            while piece := source.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:12]


def _check_adapter(label: str, adapter: Adapter) -> None:
    found = [module for module in adapter.modules if module.split(".")[-1] in _NOT_RUN]
    if found:
        raise UnsupportedAdapterError(
            f"Adapter {label} adapts {', '.join(found)}: in vLLM an adapter of the head or of an embedding has no gate "
            f"for each token. Take an adapter of linear modules inside the layers."
        )


def _named(stack: Stack) -> Mapping[str, object]:
    """The stack without where its adapters lie."""
    described = stack.to_dict()
    for layer in described["layers"]:
        layer["adapters"] = {name: name for name in layer["adapters"]}
    return described


def _lock(config: Path) -> None:
    """Says DoRA, which vLLM refuses: without the plugin, which knows better, it would run the sum of all adapters."""
    found = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**found, "use_dora": True}, indent=2) + "\n", encoding="utf-8")


def _save_router(
    router: Router | VocabularyRouter | None, base: PreTrainedModel, folder: Path
) -> Mapping[str, object] | None:
    """The entry that :func:`molora.saved.load_router` reads, and the weights; with what the router reads of each token
    id, if it does, as a table, because vLLM's embedding is split over workers, may be quantised, and leaves out what
    some families multiply it by."""
    if isinstance(router, VocabularyRouter):
        return {"kind": "vocabulary", "rules": router.rules, "rows": router.rows, "vocabulary": router.vocabulary}
    if router is None:
        return None
    part: Any = router.parts[0]
    if part.reads == 0:
        table = part.folded(base.get_input_embeddings(), base.device)
        save_file({"table": table.cpu().contiguous()}, folder / TABLE)
    return saved.save_router(router, folder / saved.ROUTER)
