"""``generate`` on a GPU: ``transformers``' own loop, with the captured decode step where it can serve."""

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from molora.backend import backend_for, failed
from molora.blueprint import Blueprint, blueprint, known
from molora.groups import AdapterGroup
from molora.plan import RoutingPlan
from molora.router import Router
from molora.routing import RoutingState
from molora.selection import without_names
from molora.spread import sharded

LARGEST_BATCH = 256
_SHORTEST = 256  # tokens that a cache has room for, at least; lengths are rounded up to powers of two
_KEPT = 4  # steps (each with its cache) that are kept for the next generation of their size
_SHARE = 1 / 8  # of the GPU's memory that their caches may hold together
_OTHER_WAYS = ("assistant_model", "cache_implementation", "custom_generate", "dola_layers", "inputs_embeds",
               "past_key_values", "penalty_alpha", "prompt_lookup_num_tokens", "output_attentions",
               "output_hidden_states", "return_dict_in_generate")  # fmt: skip


class CapturedSteps:
    """The captured steps of one model, by batch and length.

    Args:
        base: the model that generates.
        routing: which adapters act.
        groups: the adapters, by module name.
        backend: which code multiplies adapters; steps are captured with "triton", or where the device chooses.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        routing: RoutingState,
        groups: Mapping[str, AdapterGroup],
        backend: str | None = None,
    ) -> None:
        self.base, self.routing, self.groups, self.backend = base, routing, groups, backend
        self._plan: tuple[object, Blueprint | None] | None = None
        self._steps: OrderedDict[tuple[int, int, int], tuple[object, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Copies capture for themselves."""
        return {**self.__dict__, "_plan": None, "_steps": OrderedDict()}

    @contextmanager
    def serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The options for ``base.generate(*args, **kwargs)``, which within runs its decode steps captured if it can.

        It can for the bases of :mod:`molora.blueprint` on one GPU, up to 256 sequences, by sampling or greedily; with
        beams, an assistant, a cache of the caller's or outputs beside the tokens, generation is that of
        ``transformers``.
        """
        step = self._step(args, kwargs)
        if step is None:
            yield kwargs
            return
        base: Any = self.base
        base.get_compiled_call = lambda _: _Forward(self.base, self.routing, step)
        try:
            with self.reading(step.plan, step.rotary, step.cache):
                yield {**kwargs, "past_key_values": step.cache}
        finally:
            del base.get_compiled_call

    @contextmanager
    def reading(self, plan: Blueprint, rotary: tuple[torch.Tensor, torch.Tensor], cache: Any) -> Iterator[None]:
        """The base's forwards within read prompts into ``cache`` by our own kernels. Its memory is as of
        :class:`StepCache`, with room for as many tokens as ``rotary`` has positions."""
        base: Any = self.base
        if "forward" in vars(base):  # somebody's own forward stands there
            yield
            return
        base.forward = self._prompt_forward(base.forward, plan, rotary, cache)
        try:
            yield
        finally:
            del base.forward

    def _prompt_forward(
        self, forward: Any, plan: Blueprint, rotary: tuple[torch.Tensor, torch.Tensor], own: Any
    ) -> Any:
        """The base's ``forward``, which reads prompts into the cache ``own`` by our own kernels."""
        from molora.prompt import PromptPass  # needs Triton

        read = PromptPass(plan, self.groups, rotary)

        @wraps(forward)  # transformers looks at the signature
        def prompt(*args: Any, **kwargs: Any) -> Any:
            ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
            if (
                ids is None
                or args
                or cache is None
                or cache is not own
                or kwargs.get("inputs_embeds") is not None
                or kwargs.get("labels") is not None
                or kwargs.get("logits_to_keep") != 1
                or cache.length + ids.shape[1] > len(rotary[0])
            ):
                return forward(*args, **kwargs)
            routing, past = self.routing, cache.length
            mask = prompt_mask(kwargs.get("attention_mask"), routing.real, past)
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(past, past + ids.shape[1], device=ids.device).unsqueeze(0)
            try:
                logits = read(ids, positions, mask, cache, routing.plan, routing.boundary, routing.read_hidden)
            except Exception as error:  # Triton's own errors have no common class
                if not failed(error):
                    raise
                return forward(*args, **kwargs)
            return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=cache)

        return prompt

    @torch.no_grad()
    def _step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        size = self._size(args, kwargs) if self.backend in (None, "triton") else None
        plan = self.blueprint() if size is not None else None
        if size is None or plan is None:
            return None
        found = self._steps.get(size)
        if found is not None and found[0] == self.signature(plan):
            self._steps.move_to_end(size)
        else:
            self._steps.pop(size, None)
            try:
                found = self._steps[size] = self._make(plan, *size)
            except torch.OutOfMemoryError:
                self._steps.clear()  # generation as in transformers needs less
                return None
            except Exception as error:  # Triton's own errors have no common class
                if not failed(error):
                    raise
                return None
            self._forget_old()
        step = found[1]
        step.cache.reset()
        return step

    def _forget_old(self) -> None:
        """Keeps few steps, and of large ones no more than the newest."""
        room = None
        if self.base.device.type == "cuda":
            room = torch.cuda.get_device_properties(self.base.device).total_memory * _SHARE
        while len(self._steps) > 1:
            held = sum(step.cache.memory.nbytes for _, step in self._steps.values())
            if len(self._steps) <= _KEPT and (room is None or held <= room):
                break
            self._steps.popitem(last=False)

    def _make(self, plan: Blueprint, batch: int, longest: int, more: int) -> tuple[object, Any]:
        from molora.decode import DecodeStep  # needs Triton
        from molora.step_routes import StepRoutes

        step = DecodeStep(plan, self.groups, StepRoutes(self.routing, batch, plan.device, more), batch, longest)
        step.capture()
        return self.signature(plan), step

    def _size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Of a generation that a captured step can serve the batch, the length, and the columns that its selection has
        beyond those of the stack."""
        config: Any = kwargs.get("generation_config") or self.base.generation_config

        def wanted(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        router = self.routing.router
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or ids.device != self.base.device
            or not (router is None or (isinstance(router, Router) and not router.training))
            or any(wanted(name) for name in _OTHER_WAYS)
            or wanted("use_cache") is False
            or wanted("disable_compile")
            or (wanted("num_beams") or 1) > 1
            or torch.is_autocast_enabled(ids.device.type)
        ):
            return None
        batch = ids.shape[0] * (wanted("num_return_sequences") or 1)
        length = ids.shape[1] + (wanted("max_new_tokens") or 20)
        if not wanted("max_new_tokens"):
            length = max(length, wanted("max_length") or 0)
        longest = max(_SHORTEST, 1 << (length - 1).bit_length())
        columns = sum(layer.top_k for layer in self.routing.layers)
        selection = self.routing.selection
        more = 0 if selection is None else selection.forced.shape[1] - columns
        return (batch, longest, more) if 1 <= batch <= LARGEST_BATCH else None

    def blueprint(self) -> Blueprint | None:
        """The base as our kernels run it; None where they cannot."""
        weight = self.base.get_input_embeddings().weight
        if sharded(weight):
            return None
        key = (weight.data_ptr(), weight.dtype)
        if self._plan is None or self._plan[0] != key:
            interpreted = weight.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and self.groups
            usable = (backend_for(weight.device) == "triton" or interpreted) and known(self.base)
            self._plan = (key, blueprint(self.base) if usable else None)
            self._steps.clear()
        return self._plan[1]

    def signature(self, plan: Blueprint, named: Collection[str] = ()) -> object:
        """What a captured step reads at fixed addresses: another one, and it has to be captured anew. named: as for
        :class:`StepRoutes`."""
        router = self.routing.router
        parts = router._parts if isinstance(router, Router) else []
        layers = without_names(self.routing.layers, named)[0]
        return (
            plan.layers[0].qkv.data_ptr(),
            [(name, group.version) for name, group in self.groups.items()],
            [(part.output.weight.data_ptr(), part.input.weight.data_ptr()) for part in parts],
            router.rows if router is not None else None,
            [(layer.slots, layer.top_k) for layer in layers],
        )


def prompt_mask(mask: Any, real: torch.Tensor | None, past: int) -> torch.Tensor | None:
    """What the tokens of a prompt may attend to, as ``scaled_dot_product_attention`` takes it; None: all before them.

    Args:
        mask: that of a forward: [N, past + T], or [N, 1, T, past + T], or by kind of layer.
        real: [N, T] bool, False at padding.
        past: tokens in the cache.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if mask is None or (past == 0 and real is not None and bool(real.all())):
        return None  # without padding there is a faster kernel, worth asking the device once a prompt
    if mask.dim() == 4:
        return mask
    T = mask.shape[1] - past
    causal = torch.ones(T, mask.shape[1], dtype=torch.bool, device=mask.device).tril(past)
    # A padding token sees itself, so that it has something to attend to.
    own = torch.eye(T, mask.shape[1], dtype=torch.bool, device=mask.device).roll(past, 1)
    return (causal & mask[:, None, None, :].bool()) | own


class _Forward:
    """What ``generate`` calls for each token after the prompt."""

    def __init__(self, base: PreTrainedModel, routing: RoutingState, step: Any) -> None:
        self.base, self.routing, self.step = base, routing, step
        self.begun = False
        self._routes: list[tuple[torch.Tensor, torch.Tensor]] = []  # by region, where each step writes its plan

    def __call__(self, **inputs: Any) -> Any:
        step, ids = self.step, inputs["input_ids"]
        length = step.cache.length
        if ids.shape[1] != 1 or length >= step.longest:  # a piece of a long prompt; more than the cache was made for
            return self.base(**inputs)
        if not self.begun:
            self._begin(length, inputs.get("attention_mask"), inputs.get("position_ids"))
            self.begun = True
        logits = step(ids[:, -1])
        self.routing.first = length
        self.routing.plans = [RoutingPlan(*route) for route in self._routes]  # what a plan keeps is of one step
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=step.cache)

    def _begin(self, length: int, mask: Any, positions: Any) -> None:
        step, device = self.step, self.step.ids.device
        selection = self.routing.selection
        assert selection is not None
        step.routes.start(selection.expand(step.batch).to(device), getattr(step.cache, "routing_memories", None))
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention")
        if mask is None:
            seen = torch.ones(step.batch, length, dtype=torch.bool, device=device)
        elif mask.dim() == 2:
            seen = mask[:, :length].bool()
        else:
            seen = mask[:, 0, -1, :length]
            seen = (seen if seen.dtype == torch.bool else seen >= 0).expand(step.batch, -1)
        if positions is None:
            positions = torch.full((1, 1), length, device=device)
        step.start(seen, positions[:, -1].expand(step.batch))
        regions = (0,) if step.routes.boundary is None else (0, step.routes.boundary)
        self._routes = [(slots.unsqueeze(1), weights.unsqueeze(1)) for slots, weights in map(step.routes.plan, regions)]
