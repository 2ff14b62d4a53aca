"""The router's memory lives in the KV cache: what happens to the cache's sequences happens to it."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import Cache

from molora.errors import CacheError
from molora.memory import Memory

_UNSEEN = (
    "These past_key_values hold text that was run without the router, so its memory of it is missing. "
    "Run the text through this model, or pass the past_key_values that this model returned."
)


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


@cache
def _routed(cls: Any) -> Any:
    return type(f"Routed{cls.__name__}", (RoutedCacheMixin, cls), {})


def attach(cache: Cache, memories: list[Memory]) -> None:
    """Makes ``cache`` carry ``memories``: it stays an instance of its class and keeps every method."""
    cache.routing_memories = memories
    cls: Any = type(cache)
    cache.__class__ = _routed(cls)


def memories_of(cache: Cache, batch: int, owners: Sequence[object]) -> list[Memory] | None:
    """The memories that ``cache`` carries; None for a cache that is new.

    Args:
        cache: of the forward.
        batch: its sequences.
        owners: signature of each part of the router.

    Raises:
        CacheError: the cache has tokens that this router never saw, or sequences it does not know.
    """
    memories = getattr(cache, "routing_memories", None)
    length = cache.get_seq_length()
    if memories is None:
        if int(length) > 0:
            raise CacheError(_UNSEEN)
        return None
    # Static caches count on the device, where reading the count would wait for it; they cannot be shortened either.
    if isinstance(length, int) and any(len(memory) != length for memory in memories):
        raise CacheError(_UNSEEN)
    if length and [memory.owner for memory in memories] != list(owners):
        raise CacheError(
            "These past_key_values were filled under another router, whose memory this one cannot go on with. "
            "Run the text through this model again."
        )
    if any(len(memory) and memory.batch != batch for memory in memories):
        raise CacheError(f"These past_key_values hold {memories[0].batch} sequences, and the batch has {batch}.")
    return memories
