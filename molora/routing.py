"""What one forward of a routed model shares: it routes the tokens once, and every module reads the plan from here."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from molora.backend import backend_for, failed
from molora.cache import attach, memories_of
from molora.errors import BaseModelError, SelectionError
from molora.memory import Memory
from molora.outputs import Routes, read_plan
from molora.plan import (
    LayerTable,
    RoutingPlan,
    forced_plan,
    kernel_candidates,
    layer_tables,
    route,
    route_by_kernel,
)
from molora.router import Router
from molora.selection import LayerCandidates, ResolvedSelection, column_layers
from molora.spread import current
from molora.vocabulary import VocabularyRouter


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder layers of a causal LM.

    Raises:
        BaseModelError: none are found.
    """
    count = base.config.get_text_config().num_hidden_layers
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise BaseModelError(f"{type(base).__name__} has no list of {count} decoder layers, so it cannot be routed.")


class _Enough(Exception):
    """What a forward was run for is there."""


@contextmanager
def no_further(layer: nn.Module) -> Iterator[None]:
    """A forward within ends where ``layer`` begins, after the hooks that it has by now; what follows it is not run."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


class RoutingState:
    """Routes each forward of ``base`` by hooks before it and before the layers at which the router reads.

    Outside :meth:`active` the hooks do nothing and the base is the base.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.router: Router | VocabularyRouter | None = None
        self.layers: Sequence[LayerCandidates] = ()
        self.selection: ResolvedSelection | None = None
        self.plans: list[RoutingPlan | None] = []  # by region: below the deeper reading point, and from it on
        self.logits: list[torch.Tensor | None] = []  # by part of the router, [batch, tokens, rows]
        self.features: list[torch.Tensor | None] = []  # by part, q [batch, tokens, hidden]
        self.lock = threading.RLock()
        self.kept: slice | torch.Tensor = slice(None)  # positions whose hidden states reach the head
        self.first: Any = 0  # position of the first token of the forward in its sequence
        self._owners: list[object] = []
        self.boundary: int | None = None
        self._real: torch.Tensor | None = None
        self._memories: list[Memory] | None = None
        self._current: ResolvedSelection | None = None
        self._placed: tuple[ResolvedSelection, int, torch.device] | None = None  # what it was made from
        self._true: torch.Tensor | None = None  # [1, 1] bool
        self._tables: tuple[object, list[LayerTable]] | None = None
        self._flat: tuple[object, Any] | None = None  # the candidates for kernels, and what they were made from
        self._hooks: list[Any] = [base.register_forward_pre_hook(self._before_base, with_kwargs=True)]

    def set_router(self, router: Router | VocabularyRouter | None) -> None:
        for hook in self._hooks[1:]:
            hook.remove()
        del self._hooks[1:]
        self.router = router
        self._owners = [part.signature() for part in router.parts] if router else []  # type: ignore[operator]
        self.boundary = (max(router.points) or None) if router else None
        if self.boundary is not None:
            layer = decoder_layers(self.base)[1][self.boundary]
            self._hooks.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))

    def plan(self, layer: int) -> RoutingPlan | None:
        """The plan for modules of decoder layer ``layer``; None outside a routed forward."""
        if not self.plans:
            return None
        return self.plans[0 if self.boundary is None or layer < self.boundary else 1]

    def forget(self) -> None:
        """Lets go of the last forward, and with it of what its gradient would need."""
        self.plans, self.logits, self.features = [], [], []

    @property
    def real(self) -> torch.Tensor | None:
        """[batch, tokens] bool, which tokens of the forward are no padding."""
        return self._real

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    @contextmanager
    def active(self, resolve: Callable[[], ResolvedSelection]) -> Iterator[None]:
        """Forwards within run under the selection that ``resolve`` gives. One thread at a time: others wait.

        It is asked when the turn has come: the stack may have changed while waiting.
        """
        with self.lock:
            selection = resolve()
            if selection.open:
                raise SelectionError(
                    f"Layer {selection.open[0]!r} is told by a question, and none is given here: name the adapter that "
                    f"model.find(question) gives."
                )
            before, self.selection = self.selection, selection
            try:
                yield
            finally:
                self.selection = before
                training = self.router is not None and self.router.training and torch.is_grad_enabled()
                if not training:  # a checkpointed layer runs again in the backward pass
                    self.plans = []

    @contextmanager
    def off(self) -> Iterator[None]:
        """Forwards within are the base's alone; by the one who has the turn."""
        before, self.selection = self.selection, None
        try:
            yield
        finally:
            self.selection = before

    def routes(self, names: list[str]) -> Routes:
        """Of the forward that just ran. names: of the slots."""
        plan = self.plans[-1]
        assert plan is not None and self._real is not None
        columns = column_layers(self.layers, plan.shape[-1])
        rows = self.router.rows if self.router is not None else []
        return Routes(plan.slots, plan.weights, names, columns, list(self.logits), rows, self._real)

    def route_at(self, position: int, names: list[str]) -> list[tuple[str, str | None, float]]:
        """The route of one of its tokens, by the position in its (only) sequence."""
        plan = self.plans[-1]
        assert plan is not None
        index = position - int(self.first)
        columns = column_layers(self.layers, plan.shape[-1])
        return read_plan(plan.slots[0, index], plan.weights[0, index], names, columns)

    def _before_base(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.selection is None:
            self.plans = []
            return None
        if args:
            kwargs["input_ids"] = args[0]
            args = args[1:]
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise BaseModelError("Give input_ids or inputs_embeds.")
        batch, tokens = source.shape[:2]
        cache = self._cache(kwargs)
        self.first = cache.get_seq_length() if cache is not None else 0
        keep = kwargs.get("logits_to_keep", 0)
        self.kept = keep if isinstance(keep, torch.Tensor) else slice(-keep if keep else None, None)
        placed = (self.selection, batch, source.device)
        if self._placed != placed:
            self._placed, self._current = placed, self.selection.expand(batch).to(source.device)
        if self._true is None or self._true.device != source.device:
            self._true = torch.ones(1, 1, dtype=torch.bool, device=source.device)
        assert self._current is not None and self._true is not None
        self._real = real_tokens(kwargs.get("attention_mask"), batch, tokens, cache, self._true)
        parts: Any = self.router.parts if self.router is not None else ()
        self.logits, self.features = [None] * len(parts), [None] * len(parts)
        self._memories = self._find_memories(cache, batch)
        by_token = self.router is not None and self.router.points[0] == 0
        first = self._route(0, ids, embeds) if by_token else forced_plan(self._current, tokens)
        self.plans = [first] if self.boundary is None else [first, None]
        return args, kwargs

    def _before_layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.selection is None or self.router is None:
            return
        self.read_hidden(args[0] if args else kwargs["hidden_states"])

    def read_hidden(self, hidden: torch.Tensor) -> None:
        """Routes by the hidden states [batch, tokens, D] that enter layer ``boundary``."""
        assert self.router is not None
        self.plans[1] = self._route(len(self.router.parts) - 1, None, hidden)

    def _route(self, index: int, ids: torch.Tensor | None, hidden: torch.Tensor | None) -> RoutingPlan:
        """Routes by a part of the router, which reads ids [batch, tokens], or hidden states [batch, tokens, D]."""
        assert self._real is not None
        with torch.autocast(self._real.device.type, enabled=False), current(self._real.device):  # a router is float32
            return self._route_in_float32(index, ids, hidden)

    def _route_in_float32(self, index: int, ids: torch.Tensor | None, hidden: torch.Tensor | None) -> RoutingPlan:
        assert self.router is not None and self._current is not None and self._real is not None
        memory = self._memories[index] if self._memories is not None else None
        if not self._current.any_routed and not self.router.training:
            if memory is not None:  # a later turn may ask the router
                memory.append(self._read(index, ids, hidden), self._real)
            return forced_plan(self._current, self._real.shape[1])
        candidates = self._kernel_candidates(self._real.device)
        if candidates is not None and isinstance(self.router, Router):
            try:
                return self._route_by_kernels(index, ids, hidden, memory, candidates)
            except Exception as error:  # Triton's own errors have no common class
                if not failed(error):
                    raise
                candidates = None
        part: Any = self.router.parts[index]
        q = part.features(self._read(index, ids, hidden), self._real, memory)
        logits = part(q)
        self.features[index], self.logits[index] = q, logits
        if candidates is not None:
            return route_by_kernel(logits.contiguous(), candidates, self._current, self.router.weights)
        through = self.router.training and torch.is_grad_enabled()
        return route(logits, self._layer_tables(logits.device), self._current, self.router.weights, through)

    def _read(self, index: int, ids: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """z [batch, tokens, width] float32."""
        assert self.router is not None
        part: Any = self.router.parts[index]
        return part.read(hidden) if ids is None else part.read_ids(ids, self.base.get_input_embeddings())

    def _route_by_kernels(
        self, index: int, ids: torch.Tensor | None, hidden: torch.Tensor | None, memory: Memory | None, candidates: Any
    ) -> RoutingPlan:
        """From tokens to their plan in five launches."""
        from molora_kernels.route import route_prompt  # needs Triton

        assert self.router is not None and self._current is not None and self._real is not None
        part: Any = self.router.parts[index]
        if ids is None or part.training:
            ids, table = None, self._read(index, ids, hidden).flatten(0, 1)
        else:
            table = part.folded(self.base.get_input_embeddings(), ids.device)
        past = memory.state if memory is not None and len(memory) else None
        softmax = self.router.weights == "softmax"
        found = route_prompt(
            ids, self._real, part.for_kernels(table), candidates, self._current.for_kernels, past, softmax
        )  # fmt: skip
        if memory is not None:
            memory.keep(found.z, self._real, found.memory)
        self.features[index], self.logits[index] = found.q, found.logits
        return RoutingPlan(found.slots, found.weights, unit=not softmax and self._current.unit)

    def _kernel_candidates(self, device: torch.device) -> Any:
        """The candidates as the routing kernels read them; None where kernels do not route."""
        assert self.router is not None and self._current is not None
        columns = self._current.forced.shape[1]
        if torch.is_grad_enabled() or not columns or backend_for(device) != "triton":
            return None
        key = (list(self.router.rows), list(self.layers), columns, device)
        if self._flat is None or self._flat[0] != key:
            self._flat = (key, kernel_candidates(self.router.rows, self.layers, columns, device))
        return self._flat[1]

    def _layer_tables(self, device: torch.device) -> list[LayerTable]:
        assert self.router is not None
        key = (list(self.router.rows), list(self.layers), device)
        if self._tables is None or self._tables[0] != key:
            self._tables = (key, layer_tables(self.router.rows, self.layers, device))
        return self._tables[1]

    def _cache(self, kwargs: dict[str, Any]) -> Cache | None:
        """The cache of this forward; made here where the model would make it, so that it can carry the memory."""
        config = self.base.config
        use = kwargs.get("use_cache")
        use = getattr(config.get_text_config(), "use_cache", True) if use is None else use
        learning = self.base.training or (self.router is not None and self.router.training and torch.is_grad_enabled())
        if kwargs.get("past_key_values") is None and use and self.router is not None and not learning:
            kwargs["past_key_values"] = DynamicCache(config=config)
        return kwargs.get("past_key_values")

    def _find_memories(self, cache: Cache | None, batch: int) -> list[Memory] | None:
        if cache is None or self.router is None:
            return None
        memories = memories_of(cache, batch, self._owners)
        if memories is None or any(len(memory) == 0 for memory in memories):
            parts: Any = self.router.parts
            memories = [part.new_memory(batch, owner) for part, owner in zip(parts, self._owners, strict=True)]
            if hasattr(cache, "routing_memories"):
                cache.routing_memories = memories
            else:
                attach(cache, memories)
        return memories


def real_tokens(mask: Any, batch: int, tokens: int, cache: Cache | None, true: torch.Tensor) -> torch.Tensor:
    """[batch, tokens] bool: which of the current tokens are no padding, from the 2-D mask, or the 4-D one that static
    caches get. ``true``: [1, 1] bool, which without a mask stands for all of them. The mask itself is not kept."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor) or getattr(cache, "unpadded", False):
        return true.expand(batch, tokens)
    if mask.dim() == 2:
        return mask[:, -tokens:].to(device=true.device, dtype=torch.bool, copy=True)
    first = int(cache.get_seq_length()) if cache is not None else 0
    seen = mask[:, 0, -1, first : first + tokens]  # what the last token may see of them
    return (seen if seen.dtype == torch.bool else seen >= 0).expand(batch, tokens).to(true.device, copy=True)
