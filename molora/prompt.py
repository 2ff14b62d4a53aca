"""A whole prompt of a routed model in few launches: the products by the library, all between them by our kernels."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from molora.blueprint import GATE_UP, QKV, Blueprint
from molora.groups import AdapterGroup
from molora.plan import RoutingPlan
from molora.step_cache import StepCache
from molora_kernels import forms
from molora_kernels.epilogue import Added, Scale, add_norm, gate, heads
from molora_kernels.paged import expand_paged, passes, shrink_paged


class PromptPass:
    """Runs prompts into a cache of fixed memory.

    Args:
        plan: the base.
        groups: by module name, the adapters of the modules that are adapted.
        rotary: cos and sin [positions, d / 2].
    """

    def __init__(
        self, plan: Blueprint, groups: Mapping[str, AdapterGroup], rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self.plan, self.groups, self.rotary = plan, groups, rotary

    @torch.no_grad()
    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: StepCache,
        plan_of: Callable[[int], RoutingPlan | None],
        boundary: int | None = None,
        read_hidden: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Logits [N, vocabulary] after the last token of each sequence. The cache holds the tokens afterwards.

        Args:
            ids: [N, T] int64.
            positions: [N, T] int64, rotary.
            mask: [N or 1, 1, T, past + T] bool or additive, what each token may attend to; None: all before it.
            cache: with the past; there is room for T more.
            plan_of: the plan of a decoder layer, or of the head after the last.
            boundary, read_hidden: gets the hidden states [N, T, D] that enter layer ``boundary``, before its plan is
                asked for.
        """
        base, (N, T) = self.plan, ids.shape
        past = cache.length
        length = torch.full((N,), past, device=ids.device)
        rows = positions.expand(N, T).reshape(-1).contiguous()  # of one token each it would be one number
        residual = F.embedding(ids, base.embedding).view(N * T, -1)
        x = torch.empty_like(residual)
        q = residual.new_empty(N, T, base.heads, base.head_width)
        m = residual.new_empty(N * T, base.layers[0].down.shape[1])
        scale = Scale.of(N * T, base.hidden, base.eps, base.dtype, base.device)
        add_norm(residual, None, base.layers[0].norms[0], x, base.eps)
        for index, layer in enumerate(base.layers):
            if index == boundary and read_hidden is not None:
                read_hidden(residual.view(N, T, -1))
            plan = plan_of(index)
            at, last = f"{base.prefix}.{index}", index + 1 == len(base.layers)
            keys, values = cache.memory[index]
            y, added = self._product(f"{at}.self_attn.{QKV[0]}", layer.qkv, x, plan)
            heads(
                y, layer.bias, q, keys, values, layer.head_norms, self.rotary, rows, length, added,
                scale=scale if index else None,
            )  # fmt: skip
            # Attention answers in the layout of q, so that its heads come back side by side without a copy.
            attended = attend(q.transpose(1, 2), keys[:, :, : past + T], values[:, :, : past + T], mask, past)
            attended = attended.transpose(1, 2).reshape(N * T, -1)
            y, added = self._product(f"{at}.self_attn.o_proj", layer.o, attended, plan)
            add_norm(residual, y, layer.norms[1], x, base.eps, added, scale=scale)
            y, added = self._product(f"{at}.mlp.{GATE_UP[0]}", layer.gate_up, x, plan)
            gate(y, m, added, scale=scale)
            gain = base.norm if last else base.layers[index + 1].norms[0]
            y, added = self._product(f"{at}.mlp.down_proj", layer.down, m, plan)
            add_norm(residual, y, gain, x, base.eps, added, scale=None if last else scale)
        cache.advance(T)
        return self._head(x.view(N, T, -1)[:, -1], plan_of(len(base.layers)))

    def _product(
        self, name: str, weight: torch.Tensor, x: torch.Tensor, plan: RoutingPlan | None
    ) -> tuple[torch.Tensor, Added | None]:
        """The product [1, T, O] of a group of modules, and what of its adapters is not in it yet."""
        y = x @ weight.T
        group = self.groups.get(name)
        if group is None or plan is None or not plan.shape[-1]:
            return y.unsqueeze(0), None
        if not group.adapts:
            return y.unsqueeze(0), None
        pages, (paged, *more) = group.pages, passes(plan.paged, group.pages)
        for part in more:
            expand_paged(y, shrink_paged(x, pages, part), pages, part)
        blocks = None if forms.by_token(len(x)) else paged.blocks
        return y.unsqueeze(0), Added(shrink_paged(x, pages, paged), pages, paged.slots, paged.weights, blocks)

    def _head(self, x: torch.Tensor, plan: RoutingPlan | None) -> torch.Tensor:
        logits = x @ self.plan.head.T
        group = self.groups.get("lm_head")
        if group is None or plan is None or not plan.shape[-1]:
            return logits
        return group.add(logits, x, x, plan.at(slice(-1, None)).paged, 0)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, past: int
) -> torch.Tensor:
    """Attention [N, H, T, d] of q [N, H, T, d] over keys and values [N, G, past + T, d]."""
    T = q.shape[2]
    if mask is None and past == 0:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    if mask is None:
        mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
    # With a mask, only keys and values of as many heads as q has go through a kernel that keeps no scores.
    shape = (q.shape[0], q.shape[1], past + T, q.shape[3])
    keys, values = (of.unsqueeze(2).expand(-1, -1, shape[1] // of.shape[1], -1, -1).reshape(shape)
                    for of in (keys, values))  # fmt: skip
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
