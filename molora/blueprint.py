"""What of a base the decode step needs: the weights of its layers, for the families whose layers it knows.

Known are models whose layer is: RMSNorm, attention with rotary positions (with or without a norm of q and k, with or
without a bias of q, k and v), RMSNorm, SiLU(gate) * up, down. Any other base decodes as ``transformers`` does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from molora.layer import MoLoRALinear
from molora.spread import sharded

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass
class LayerWeights:
    """One decoder layer. Products: [out, in], those that share an input one below the other."""

    qkv: torch.Tensor
    bias: torch.Tensor | None
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor]  # gains before attention and before the MLP
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None  # gains of q's and k's norm, eps


@dataclass
class Blueprint:
    """A base that the decode step knows."""

    base: PreTrainedModel
    prefix: str  # name of the list of layers
    heads: int
    kv_heads: int
    head_width: int
    eps: float
    layers: list[LayerWeights]
    norm: torch.Tensor
    embedding: torch.Tensor
    head: torch.Tensor

    @property
    def hidden(self) -> int:
        return int(self.norm.shape[0])

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    def rotary(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [positions, d / 2] as the base computes them."""
        x = torch.empty(1, 1, 1, dtype=self.dtype, device=self.device)
        model: Any = self.base.base_model
        cos, sin = model.rotary_emb(x, torch.arange(positions, device=self.device).unsqueeze(0))
        half = self.head_width // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def known(base: PreTrainedModel) -> bool:
    """Whether the decode step knows this base: its family, and nothing in its settings that it does not do."""
    config: Any = base.config
    linear = [m for m in base.modules() if isinstance(m, nn.Linear)]
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not (config.model_type == "mistral" and config.sliding_window)
        and (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in ("dynamic", "longrope")
        and len({p.device for p in base.parameters()}) == 1
        and not any(sharded(p) for p in base.parameters())
        and len({p.dtype for p in base.parameters()}) == 1
        and all(type(m) is nn.Linear and m.weight.is_floating_point() for m in linear)
        and all(layer.self_attn.o_proj.bias is None for layer in base.base_model.layers)
    )


def blueprint(base: PreTrainedModel) -> Blueprint:
    """The blueprint of a base that is :func:`known`. Weights that share an input are laid one below the other in
    memory: their modules' parameters become views."""
    config: Any = base.config
    model: Any = base.base_model
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = []
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [plain(getattr(attention, name)) for name in QKV]
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, attention.k_norm.weight, float(attention.q_norm.variance_epsilon))
        layers.append(
            LayerWeights(
                fuse(qkv),
                torch.cat([module.bias for module in qkv]) if qkv[0].bias is not None else None,
                plain(attention.o_proj).weight,
                fuse([plain(getattr(mlp, name)) for name in GATE_UP]),
                plain(mlp.down_proj).weight,
                (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                norms,
            )
        )
    prefix = next(name for name, module in base.named_modules() if module is model.layers)
    return Blueprint(
        base, prefix, config.num_attention_heads, config.num_key_value_heads, width, float(config.rms_norm_eps),
        layers, model.norm.weight, base.get_input_embeddings().weight, plain(base.get_output_embeddings()).weight,
    )  # fmt: skip


def plain(module: Any) -> nn.Linear:
    inner: Any = module.base_layer if isinstance(module, MoLoRALinear) else module
    return inner


@torch.no_grad()
def fuse(modules: Sequence[nn.Linear]) -> torch.Tensor:
    """[sum of O, D]: the weights one below the other, the modules' own parameters views of it."""
    rows, width = sum(module.out_features for module in modules), modules[0].in_features
    first, at = modules[0].weight, 0
    for module in modules:
        weight = module.weight
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.storage_offset() == first.storage_offset() + at * width):
            joined = torch.cat([module.weight for module in modules])
            for module, part in zip(modules, joined.split([m.out_features for m in modules]), strict=True):
                module.weight.data = part
            return joined
        at += module.out_features
    return torch.as_strided(first.detach(), (rows, width), (width, 1))
