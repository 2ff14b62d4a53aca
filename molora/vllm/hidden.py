"""The hidden states that enter a decoder layer of vLLM's models."""

import inspect
from typing import Any

import torch
from torch import nn

from molora.errors import BackendError


def decoder_layer(model: nn.Module, count: int, number: int) -> nn.Module:
    """Decoder layer ``number`` of ``count`` in a causal LM of vLLM.

    Raises:
        BackendError: there is none, or what enters it is not known.
    """
    for parent in model.modules():
        for layers in parent.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == count:
                # A layer that is handed a residual may add it to its input (Llama) or not look at it (Cohere). Of
                # models with this method vLLM itself says, to speculative decoding, that the sum is the hidden state.
                residual = "residual" in inspect.signature(layers[number].forward).parameters
                if residual and not hasattr(parent, "_maybe_add_hidden_state"):
                    break
                return layers[number]
    raise BackendError(
        f"This router reads the hidden state at layer {number}, which vLLM's {type(model).__name__} does not show: "
        f"train one that reads the embedding (`molora train router`, reads = 0)."
    )


def entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """[tokens and padding, D], by what a layer of :func:`decoder_layer` is called with."""
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    hidden: torch.Tensor = given["hidden_states"]
    residual = given.get("residual")
    return hidden if residual is None else hidden + residual
