"""Routing inside a worker: before each forward, and where a router reads a hidden state within it, the wrapper of
vLLM's LoRA arithmetic is told which adapters act."""

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import FullAttentionSpec

from molora.errors import BackendError
from molora.plan import RoutingPlan
from molora.vllm.folder import MANIFEST
from molora.vllm.hidden import decoder_layer, entering
from molora.vllm.memory import SlotMemory
from molora.vllm.routed import Group, RoutedStack, Step
from molora.vllm.selections import choice_of
from molora.vllm.turns import turns


class Routing:
    """What a model runner of vLLM needs to route.

    Each forward of requests goes through ``runner._model_forward``, and neither trial runs nor the capture of CUDA
    graphs do: what is written there into memory that does not move is what a captured graph reads too.

    Args:
        runner: whose LoRA model has been loaded.

    Raises:
        BackendError: it is of another kind.
    """

    def __init__(self, runner: Any) -> None:
        if not hasattr(runner, "_model_forward"):
            raise BackendError("MoLoRA does not know vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")
        self.runner = runner
        self.memory: SlotMemory | None = None
        self._under_way: list[tuple[Group, RoutingPlan]] = []  # of the forward
        self._tokens = 0  # of it
        self._read: set[int] = set()  # the decoder layers at which hidden states are read
        runner._model_forward = self._routed(runner._model_forward)

    @property
    def manager(self) -> Any:
        return self.runner.lora_manager._adapter_manager

    @property
    def wrapper(self) -> Any:
        """The language model's."""
        return next(iter(self.manager.punica_wrapper_mapping.values()))

    @property
    def _base(self) -> Any:
        """The language model's configuration."""
        return self.runner.vllm_config.model_config.hf_text_config

    def open(self, folder: Path) -> RoutedStack | None:
        """The stack of a LoRA's folder; None of an ordinary adapter.

        Raises:
            BackendError: vLLM was configured for what is not covered, or its KV cache is one that no memory can follow.
            MoLoRAError: see :class:`RoutedStack`.
        """
        if not (folder / MANIFEST).is_file():
            return None
        _check(self.runner.vllm_config, self.manager.supports_mm)
        stack = RoutedStack(folder, self.runner.device)
        if stack.router is not None:
            base = self._base
            stack.router.check(stack.router.rows, base.hidden_size, base.num_hidden_layers, base.vocab_size)
        if stack.boundary is not None:
            check_shown(self.runner.vllm_config)
            self._read_at(stack.boundary)
        if stack.size:
            if self.memory is None:
                self.memory = SlotMemory(_slots(self.runner), self.runner.device)
            self.memory.widen(stack.size)
        return stack

    def _routed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def routed(input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            self.route(input_ids)
            try:
                return forward(input_ids, *args, **kwargs)
            finally:  # trial runs come by the layers, too
                self._under_way = []
                self.wrapper.done()

        return routed

    def route(self, ids: torch.Tensor | None) -> None:
        """The tokens ids [tokens and padding] of the batch that the runner is about to run."""
        starts = self.runner.query_start_loc.np[: self.runner.input_batch.num_reqs + 1]
        self._under_way = []
        for group in self._grouped(starts):
            read = None if ids is None else ids[group.at].long()
            self._under_way.append((group, group.stack.plan(group.step, read, self._memory_of(group.stack))))
        self._tokens = int(starts[-1])
        self.wrapper.route(self._tokens, self._under_way)

    def _read_at(self, boundary: int) -> None:
        """Has each forward routed anew when the hidden states enter decoder layer ``boundary``."""
        if boundary in self._read:
            return
        layer = decoder_layer(self.manager.model, self._base.num_hidden_layers, boundary)

        def reroute(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if all(group.stack.boundary != boundary for group, _ in self._under_way):
                return
            hidden, workers = entering(layer, args, kwargs).float(), get_tp_group()
            if workers.world_size > 1:  # rounded otherwise, it might be routed otherwise
                hidden = workers.broadcast(hidden, src=0)
            for place, (group, _) in enumerate(self._under_way):
                if group.stack.boundary == boundary:
                    found = group.stack.plan_from(group.step, hidden[group.at], self._memory_of(group.stack))
                    self._under_way[place] = group, found
            self.wrapper.route(self._tokens, self._under_way)

        layer.register_forward_pre_hook(reroute, with_kwargs=True)
        self._read.add(boundary)

    def _memory_of(self, stack: RoutedStack) -> SlotMemory | None:
        return self.memory if stack.size else None

    def _grouped(self, starts: np.ndarray) -> list[Group]:
        """The requests of each stack and selection that have the same number of tokens in this step: all those that
        decode are one group, and no group needs padding. A group comes after those whose tokens it goes on from."""
        batch = self.runner.input_batch
        mapping = batch.request_lora_mapping[: len(starts) - 1].tolist()
        adapters = {lora: self.manager.get_adapter(lora) for lora in set(mapping) if lora}
        stacks = {lora: found.molora for lora, found in adapters.items() if getattr(found, "molora", None) is not None}
        routed = [request for request, lora in enumerate(mapping) if lora in stacks]
        if not routed:
            return []
        before, slots = self._kv_slots(starts)
        turn = turns(before, slots, starts)
        requests_of: dict[tuple[int, int, str | None, int], list[int]] = defaultdict(list)
        for request in routed:
            length = int(starts[request + 1] - starts[request])
            if length:
                choice = choice_of(self.runner.requests[batch.req_ids[request]].sampling_params)
                requests_of[int(turn[request]), mapping[request], choice, length].append(request)
        found = []
        for (_, lora, choice, length), requests in sorted(requests_of.items(), key=lambda item: item[0][0]):
            places = starts[requests][:, None] + np.arange(length)
            at, first, own = self._sent(places, before[requests], slots[places])
            slot = self.manager.lora_index_to_id.index(lora)
            found.append(Group(stacks[lora], slot, at, Step(choice, first, own)))
        return found

    def _sent(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """On the device, in one copy, without waiting for it: it may be at the step before still."""
        sent = async_tensor_h2d(np.concatenate([array.ravel() for array in arrays]), self.runner.device)
        parts = sent.split([array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _kv_slots(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KV slots [n] of the token before each request's of this step, -1 where there is none, and [tokens] of the
        step's."""
        batch = self.runner.input_batch
        blocks = batch.block_table[0]
        first = batch.num_computed_tokens_cpu[: len(starts) - 1].astype(np.int64)
        requests = np.arange(len(first))

        def slots(requests: np.ndarray, positions: np.ndarray) -> np.ndarray:
            block, inside = np.divmod(positions, blocks.block_size)
            own: np.ndarray = blocks.block_table.np[requests, block].astype(np.int64) * blocks.block_size + inside
            return own

        before = np.where(first > 0, slots(requests, np.maximum(first - 1, 0)), -1)
        of = np.repeat(requests, np.diff(starts))
        return before, slots(of, np.arange(len(of)) - starts[of] + first[of])


def _check(config: Any, multimodal: bool) -> None:
    """Raises BackendError where vLLM was configured for what is not covered."""
    parallel = config.parallel_config
    found = {
        "multimodal models": multimodal,
        "prompts that are embeddings": config.model_config.enable_prompt_embeds,
        "speculative decoding": config.speculative_config is not None,
        "KV caches that are moved or offloaded": config.kv_transfer_config is not None,  # the memory would stay
        "pipeline stages": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "micro-batches": parallel.use_ubatching,
    }
    if any(found.values()):
        kinds = " and ".join(kind for kind, there in found.items() if there)
        raise BackendError(f"MoLoRA does not route in vLLM with {kinds} yet: switch that off.")


def check_shown(config: Any) -> None:
    """Raises BackendError where a forward does not come by the layers: a captured or compiled one."""
    compilation = config.compilation_config
    if compilation.mode != CompilationMode.NONE or compilation.cudagraph_mode != CUDAGraphMode.NONE:
        raise BackendError(
            "This router reads a hidden state, which vLLM's compiled models do not show: start vLLM with "
            "--enforce-eager, or train one that reads the embedding (`molora train router`, reads = 0)."
        )


def _slots(runner: Any) -> int:
    """Number of KV slots.

    Raises:
        BackendError: a token has several, or none that lasts.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        raise BackendError(f"A router's memory follows a KV cache of full attention only, and this model has {kinds}.")
    return int(runner.kv_cache_config.num_blocks) * int(groups[0].kv_cache_spec.block_size)
