"""A KV cache in memory that never moves, for captured steps: it counts on the host and shows only what is filled."""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from molora.errors import CacheError


class StepLayer(CacheLayerMixin):
    """One layer's keys and values [batch, heads, longest, width]; forwards see the filled part alone."""

    is_compileable = True  # generate asks for the captured step of such caches alone
    is_sliding = False
    is_croppable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[2] or key_states.shape[0] != self.keys.shape[0]:
            raise CacheError(
                f"This cache is for {self.keys.shape[0]} sequences of up to {self.keys.shape[2]} tokens, "
                f"not for {key_states.shape[0]} of {end}."
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[2])

    def reset(self) -> None:
        self.length = 0  # what is there is never read before it is written

    def crop(self, max_length: int) -> None:
        self.length = min(self.length, self.length + max_length if max_length < 0 else max_length)


class CountedCache(Cache):
    """A cache of :class:`StepLayer` alone."""

    @property
    def length(self) -> int:
        return int(self.get_seq_length())

    def advance(self, tokens: int = 1) -> None:
        """So many more were written."""
        for layer in self.layers:
            layer.length += tokens


class StepCache(CountedCache):
    """Keys and values of sequences that grow together, in ``memory`` [layers, 2, batch, heads, longest, width]."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        super().__init__(layers=[StepLayer(keys, values) for keys, values in memory])
