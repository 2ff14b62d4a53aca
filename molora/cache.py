"""The router's memory lives in the KV cache: what happens to the cache's sequences happens to it."""

from functools import lru_cache
from typing import Any

import torch
from transformers import Cache

from molora.errors import CacheError
from molora.memory import Memory


class RoutedCacheMixin:
    """Added to the class of a cache that a routed model fills (see :func:`attach`)."""

    routing_memories: list[Memory]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        for memory in self.routing_memories:
            memory.crop(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for memory in self.routing_memories:
            memory.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        for memory in self.routing_memories:
            memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        for memory in self.routing_memories:
            memory.repeat(repeats)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        for memory in self.routing_memories:
            memory.crop(0)


@lru_cache
def _routed(cls: type) -> type:
    return type(f"Routed{cls.__name__}", (RoutedCacheMixin, cls), {})


def attach(cache: Cache, memories: list[Memory]) -> None:
    """Makes ``cache`` carry ``memories``: it stays an instance of its class and keeps every method."""
    cache.routing_memories = memories  # type: ignore[attr-defined]
    cache.__class__ = _routed(type(cache))


def memories_of(cache: Cache, batch: int) -> list[Memory] | None:
    """The memories that ``cache`` carries; None for a cache that is new.

    Raises:
        CacheError: the cache has tokens that this router never saw, or sequences it does not know.
    """
    memories = getattr(cache, "routing_memories", None)
    if memories is None:
        if int(cache.get_seq_length()) > 0:
            raise CacheError(
                "These past_key_values were filled without the router, so its memory of that text is missing. "
                "Run the text through this model, or pass the past_key_values that this model returned."
            )
        return None
    if any(len(memory) and memory.batch != batch for memory in memories):
        raise CacheError(f"These past_key_values hold {memories[0].batch} sequences, and the batch has {batch}.")
    return memories
