"""Does an adapter, does a router fit a base? Asked before anything of it is changed."""

import torch
from transformers import PreTrainedModel

from molora.adapter import Adapter, LoRAWeights, SharedWeights
from molora.backend import backend_for
from molora.errors import AdapterMismatchError, UnsupportedAdapterError
from molora.key_file import KEY_FILE
from molora.layer import linear_size
from molora.router import Router
from molora.routing import decoder_layers
from molora.selection import router_rows
from molora.spread import check_shares, sharded
from molora.stack import Stack
from molora.vocabulary import VocabularyRouter
from molora_kernels.pages import MAX_RANK


def linear_sizes(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear module, by its name in the base before it was wrapped."""
    sizes = {}
    for name, module in base.named_modules():
        size = linear_size(module)
        if size is not None:
            sizes[name.removesuffix(".base_layer")] = size
    return sizes


def check_fits(adapter: Adapter, base: PreTrainedModel, name: str, backend: str | None = None) -> None:
    """Raises AdapterError where ``adapter`` is for another base than the one called ``name``, or has a rank that the
    kernels do not take (``backend``: as for ``MoLoRAModel.from_base``)."""

    def weight(module: str) -> torch.Tensor | None:
        try:
            found = base.get_submodule(module.removesuffix(".weight")).weight.detach()
            return found.full_tensor() if sharded(found) else found
        except AttributeError:
            return None

    adapter.check_fits({module: size for module in adapter.modules if (size := _size(base, module))}, weight, name)
    check_shares(adapter, base)
    hidden = base.config.get_text_config().hidden_size
    if adapter.key is not None and adapter.key.shape[1] != hidden:
        raise AdapterMismatchError(
            f"{adapter.path / KEY_FILE} has {adapter.key.shape[1]} features, and {name} has {hidden}: it was made for "
            f"another base."
        )
    rank, module = max((_ranks(weights), module) for module, weights in adapter.modules.items())
    if rank > MAX_RANK and (backend or backend_for(base.device)) != "torch":
        where = module if adapter.modules[module].rank == rank else f"the basis of {module}"
        raise UnsupportedAdapterError(
            f"{adapter.path} has rank {rank} at {where}; the kernels take ranks up to {MAX_RANK}. "
            f"Use from_base(..., backend='torch')."
        )


def _ranks(weights: LoRAWeights | SharedWeights) -> int:
    """The most ranks that a kernel meets."""
    if isinstance(weights, SharedWeights):
        return max(weights.rank, weights.basis.U.shape[1], weights.basis.V.shape[1])
    return weights.rank


def _size(base: PreTrainedModel, name: str) -> tuple[int, int] | None:
    """One of :func:`linear_sizes`, without a look at all others."""
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return None
    return linear_size(getattr(module, "base_layer", module))


def check_router(router: Router | VocabularyRouter, stack: Stack, base: PreTrainedModel) -> None:
    """Raises RouterError where ``router`` is for another stack or base."""
    config = base.config.get_text_config()
    router.check(router_rows(stack), config.hidden_size, len(decoder_layers(base)[1]), config.vocab_size)
