"""An adapter that is trained on top of a routed stack: what acts at run time acts while it learns."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora import MoLoRAModel
from molora.layer import MoLoRALinear
from molora_training.selections import KeptSelections

_INNER = ".base_layer"


class OnStack(nn.Module):
    """The base of a MoLoRA with a new adapter of PEFT's inside its routed modules; all else is frozen.

    Called like the base. ``peft`` holds the new adapter.

    Args:
        model: the MoLoRA, which is changed.
        config: of the adapter; its ``target_modules`` are module names' ends, or "all-linear".
    """

    def __init__(self, model: MoLoRAModel, config: LoraConfig) -> None:
        super().__init__()
        model.requires_grad_(False)
        wanted, head = config.target_modules, model.base.get_output_embeddings()
        names = []
        for name, module in model.base.named_modules():
            linear = isinstance(module, MoLoRALinear | nn.Linear | Conv1D) and not name.endswith(_INNER)
            if linear and module is not head and (wanted == "all-linear" or name.rpartition(".")[2] in (wanted or ())):
                names.append(name + _INNER * isinstance(module, MoLoRALinear))
        config.target_modules = names
        self.peft = get_peft_model(model.base, config)
        self._model = (model,)  # no submodule: the base is one of ``peft`` already
        self.selection = KeptSelections(model, {})

    def forward(self, **inputs: Any) -> Any:
        model = self._model[0]
        with model.routing.active(lambda: self.selection(len(inputs["input_ids"]))):
            # Not through PEFT's own forward, which would pass by the hooks on the base.
            return model.base(**inputs)


def as_plain(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights under the names that they have in a base without a stack."""
    return {name.replace(f"{_INNER}.lora_", ".lora_"): tensor for name, tensor in weights.items()}
