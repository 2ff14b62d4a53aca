"""One decode step of a whole routed model in few launches, captured as a CUDA graph where there is a GPU.

Router, memory, plan, all layers and the head run from buffers at fixed addresses: a swap of adapters, another
selection or a new sequence is a write into them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from molora.blueprint import GATE_UP, QKV, Blueprint
from molora.groups import AdapterGroup
from molora.step_cache import StepCache
from molora.step_routes import StepRoutes
from molora_kernels.attention import Attention
from molora_kernels.blocks import Blocks
from molora_kernels.epilogue import Added, Scale, add_norm, gate, heads
from molora_kernels.expand import expand
from molora_kernels.linear import LinearTile, linear, shrink_block
from molora_kernels.pages import PAGE
from molora_kernels.tiles import attention_tile, linear_tile


@dataclass
class Product:
    """The product of a group of modules: its weight, how it is cut, its partial sums, and its adapters' shrink."""

    weight: torch.Tensor
    tile: LinearTile
    y: torch.Tensor  # [split, N, O]
    added: Added | None
    blocks: Blocks | None = None  # lists of the slots that act, by which the shrink goes

    def __call__(self, x: torch.Tensor, pdl: bool) -> torch.Tensor:
        added = self.added
        if added is None:
            linear(self.y, x, self.weight, self.tile, pdl=pdl)
        else:
            linear(self.y, x, self.weight, self.tile, added.h, added.pages, added.slots, pdl, self.blocks)
        return self.y


class DecodeStep:
    """The step of ``batch`` sequences over a cache of up to ``longest`` tokens.

    Args:
        plan: the base.
        groups: by module name, the adapters of the modules that are adapted.
        routes: which of them act.
        batch, longest: sizes.
        rows: [layers, 2, batch, heads, longest, width], keys and values of sequences that come and go, each with a
            length of its own and none of it padding; None: memory of the step's own for sequences that go together.
    """

    def __init__(
        self,
        plan: Blueprint,
        groups: Mapping[str, AdapterGroup],
        routes: StepRoutes,
        batch: int,
        longest: int,
        rows: torch.Tensor | None = None,
    ) -> None:
        self.plan, self.routes, self.batch, self.longest, self.apart = plan, routes, batch, longest, rows is not None
        device, dtype = plan.device, plan.dtype
        if rows is None:
            shape = (len(plan.layers), 2, batch, plan.kv_heads, longest, plan.head_width)
            rows = torch.zeros(shape, dtype=dtype, device=device)
        self.cache = StepCache(rows)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.going = torch.ones(batch, dtype=torch.int64, device=device)  # 0: a place without a sequence
        self.mask = torch.ones(batch, longest, dtype=torch.bool, device=device)
        self.rotary = plan.rotary(longest)
        past = attention_tile(batch, plan.kv_heads, longest)
        self.attention = Attention(batch, plan.heads, plan.head_width, past, device)
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

        def buffer(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        self.scale = Scale.of(batch, plan.hidden, plan.eps, dtype, device)
        self.residual, self.x = buffer(batch, plan.hidden), buffer(batch, plan.hidden)
        self.q = buffer(batch, plan.heads, plan.head_width)
        self.attended = buffer(batch, plan.heads, plan.head_width)
        first = plan.layers[0]
        self.m = buffer(batch, first.down.shape[1])
        # Layers follow one another, so one set of partial sums and shrinks serves them all.
        partial: dict[tuple[int, ...], torch.Tensor] = {}
        shrunk: dict[tuple[int, ...], torch.Tensor] = {}

        def product(name: str, layer: int, weight: torch.Tensor) -> Product:
            tile = linear_tile(batch, *weight.shape)
            shape = (tile.split, batch, weight.shape[0])
            y = partial.setdefault(shape, buffer(*shape, kind=torch.float32))
            group = groups.get(name)
            if group is None:
                return Product(weight, tile, y, None)
            slots, weights = routes.plan(layer)
            width = len(group.pages.outputs) * group.pages.max_pages * PAGE
            cuts = (-(-weight.shape[1] // shrink_block(batch, weight.shape[1])), batch, slots.shape[1], width)
            h = shrunk.setdefault(cuts, buffer(*cuts, kind=torch.float32))
            return Product(weight, tile, y, Added(h, group.pages, slots, weights), routes.blocks(layer))

        self.products = []
        for index, layer in enumerate(plan.layers):
            at = f"{plan.prefix}.{index}"
            self.products.append(
                (
                    product(f"{at}.self_attn.{QKV[0]}", index, layer.qkv),
                    product(f"{at}.self_attn.o_proj", index, layer.o),
                    product(f"{at}.mlp.{GATE_UP[0]}", index, layer.gate_up),
                    product(f"{at}.mlp.down_proj", index, layer.down),
                )
            )
        head = product("lm_head", len(plan.layers), plan.head)
        self.logits = buffer(batch, plan.head.shape[0])
        tile = LinearTile(head.tile.n, head.tile.k, 1, head.tile.warps, head.tile.stages)
        self.head = Product(head.weight, tile, self.logits.unsqueeze(0), head.added, head.blocks)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Reads ``ids`` at ``length`` of the cache; writes ``logits`` and goes on to the next position."""
        plan, pdl = self.plan, self.pdl
        self.routes.read_tokens(self.ids, pdl)
        if not self.apart:
            self.mask.index_fill_(1, self.length[:1], True)
        torch.index_select(plan.embedding, 0, self.ids, out=self.residual)
        add_norm(self.residual, None, plan.layers[0].norms[0], self.x, plan.eps)
        last = len(plan.layers) - 1
        for index, (layer, (qkv, o, gate_up, down)) in enumerate(zip(plan.layers, self.products, strict=True)):
            if index == self.routes.boundary:
                self.routes.read_hidden(self.residual, pdl)
            keys, values = self.cache.memory[index]
            scale = self.scale if index else None
            heads(
                qkv(self.x, pdl and index != self.routes.boundary), layer.bias, self.q.unsqueeze(1), keys, values,
                layer.head_norms, self.rotary, self.positions, self.length, qkv.added, pdl, scale,
            )  # fmt: skip
            self.attention(
                self.attended, self.q, keys, values, self.mask, self.length, plan.head_width**-0.5, pdl
            )  # fmt: skip
            attended = o(self.attended.flatten(1), pdl)
            add_norm(self.residual, attended, layer.norms[1], self.x, plan.eps, o.added, pdl, self.scale)
            gate(gate_up(self.x, pdl), self.m, gate_up.added, pdl, self.scale)
            gain = plan.norm if index == last else plan.layers[index + 1].norms[0]
            scale = None if index == last else self.scale  # the head's product is the logits
            add_norm(self.residual, down(self.m, pdl), gain, self.x, plan.eps, down.added, pdl, scale)
        self.head(self.x, pdl)
        if (added := self.head.added) is not None:
            expand(
                self.logits, added.h, added.pages, added.slots, added.weights, None, self.logits.device.type == "cpu"
            )  # fmt: skip
        self.length.add_(self.going)
        self.positions.add_(self.going)

    def capture(self) -> None:
        """Captures the step; what the buffers hold is lost, but not the rows that were given. Without a GPU nothing is
        done."""
        if self.ids.device.type != "cuda" or self.graph is not None:
            return
        self.length.zero_()
        self.positions.zero_()
        if self.apart:
            self.start_rows([])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        self.graph = graph

    def start(self, seen: torch.Tensor, positions: torch.Tensor) -> None:
        """Begins with the sequences that the cache holds.

        Args:
            seen: [N, length] bool, the tokens in the cache that may be attended to.
            positions: [N] int64, the rotary position of the next token of each.
        """
        self.length.fill_(self.cache.length)
        self.mask[:, : seen.shape[1]].copy_(seen)
        self.positions.copy_(positions)

    def start_rows(self, lengths: Sequence[int]) -> None:
        """Begins with sequences of so many tokens in the first of the rows that were given; nothing is done in the
        others."""
        empty = self.batch - len(lengths)
        self.length.copy_(torch.tensor([*lengths, *[-1] * empty]))
        self.positions.copy_(self.length.clamp_min(0))
        self.going.copy_(self.length >= 0)
        self.routes.real.copy_(self.going)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [N, vocabulary] after one more token ids [up to N] of each sequence. They are overwritten by the
        next."""
        self.ids[: len(ids)].copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run()
        self.cache.advance()
        return self.logits
