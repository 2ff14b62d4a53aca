"""What was read once is not read again: keys, values and router memories of the beginnings of prompts, in blocks.

A block is found by all tokens before and in it, and by what acted on them: the adapters themselves with their weights,
not their names. So two sequences share the beginning of a prompt if, and only if, the same versions of the same
adapters may act on it in the same way. With another router all is forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from molora.adapter import Adapter
from molora.memory import Memory
from molora.model import MoLoRAModel
from molora.selection import ResolvedSelection
from molora.serve.rows import RowReader

BLOCK = 64  # tokens


@dataclass(frozen=True, eq=False)
class Acting:
    """What may act on a sequence, and how. ``adapters`` keeps alive what ``key`` names by its address."""

    key: tuple[Any, ...]
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, eq=False)
class _Block:
    number: int
    parts: list[torch.Tensor]  # of RowReader.parts, BLOCK tokens
    memories: list[tuple[torch.Tensor, torch.Tensor]]  # by part of the router, z [1, BLOCK, width], the state after it
    acting: Acting
    nbytes: int


@dataclass(frozen=True)
class PrefixStats:
    """Bytes held, and tokens of prompts that were found since the start."""

    held: int
    found: int


class Prefixes:
    """Blocks of up to ``most_bytes``, least recently used out; for one thread."""

    def __init__(self, model: MoLoRAModel, most_bytes: int) -> None:
        self.model, self.most_bytes = model, most_bytes
        self._blocks: OrderedDict[tuple[Any, ...], _Block] = OrderedDict()
        self._made = self._held = self._found = 0

    def clear(self) -> None:
        self._blocks.clear()
        self._held = 0

    def stats(self) -> PrefixStats:
        return PrefixStats(self._held, self._found)

    def fill(self, reader: RowReader, ids: Sequence[int], acting: Acting) -> None:
        """Gives a new reader as much of ``ids`` as is known, but for the last token, whose logits are wanted."""
        chain = [block for _, block in self._walk(ids, acting, len(ids) - 1) if block is not None]
        if not chain:
            return
        for place, block in enumerate(chain):
            for part, known in zip(reader.parts, block.parts, strict=True):
                part[..., place * BLOCK : (place + 1) * BLOCK, :] = known
        reader.advance(len(chain) * BLOCK)
        reader.remember(self._memories(chain))
        self._found += reader.length

    def keep(self, reader: RowReader, ids: Sequence[int], acting: Acting) -> None:
        """Takes in the whole blocks of a prompt that was read; ``acting`` all along."""
        memories: list[Memory] = getattr(reader, "routing_memories", [])
        states = [memory.rule.empty(1) for memory in memories]
        for place, (key, block) in enumerate(self._walk(ids, acting, len(ids))):
            here = slice(place * BLOCK, (place + 1) * BLOCK)
            if block is not None:
                states = [state for _, state in block.memories]
                continue
            kept = []
            for index, memory in enumerate(memories):
                z = memory.z[:, here].clone()
                states[index] = memory.rule(z, memory.real[:, here], states[index])[1]
                kept.append((z, states[index]))
            parts = [part[..., here, :].clone() for part in reader.parts]
            nbytes = sum(part.nbytes for part in parts) + sum(z.nbytes + state.nbytes for z, state in kept)
            self._made += 1
            self._blocks[key] = _Block(self._made, parts, kept, acting, nbytes)
            self._held += nbytes
        while self._held > self.most_bytes and self._blocks:
            self._held -= self._blocks.popitem(last=False)[1].nbytes

    def _walk(self, ids: Sequence[int], acting: Acting, end: int) -> Iterator[tuple[tuple[Any, ...], _Block | None]]:
        """Keys of the whole blocks of ``ids[:end]`` in order, each with its block. It ends after the first one that is
        unknown, unless the caller has made it by then. A block is as recently used as those that follow it."""
        before, walked = 0, []
        for first in range(0, end - BLOCK + 1, BLOCK):
            key = (before, tuple(ids[first : first + BLOCK]), acting.key)
            yield key, self._blocks.get(key)
            if key not in self._blocks:
                break
            before = self._blocks[key].number
            walked.append(key)
        for key in reversed(walked):
            self._blocks.move_to_end(key)

    def acting(self, selection: ResolvedSelection) -> Acting:
        """What may act on the one sequence of ``selection``."""
        found: list[Adapter] = []
        names = self.model.slots.names

        def own(slot: int) -> int:
            found.append(self.model.adapters[names[slot]])
            return id(found[-1])

        key: list[Any] = [tuple(selection.routed[0].tolist())]
        for layer in self.model.routing.layers:
            allowed = selection.allowed[0, layer.all].tolist()
            key.append(tuple(own(s) for s, may in zip(layer.slots, allowed, strict=True) if may and s >= 0))
        forced = zip(selection.forced[0].tolist(), selection.shares[0].tolist(), strict=True)
        key += [(column, own(slot), share) for column, (slot, share) in enumerate(forced) if slot >= 0]
        return Acting(tuple(key), tuple(found))

    def _memories(self, chain: Sequence[_Block]) -> list[Memory]:
        routing = self.model.routing
        parts: Any = routing.router.parts if routing.router is not None else ()
        made = []
        for index, (part, owner) in enumerate(zip(parts, routing._owners, strict=True)):
            memory = part.new_memory(1, owner)
            z = torch.cat([block.memories[index][0] for block in chain], 1)
            real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
            memory.keep(z, real, chain[-1].memories[index][1])
            made.append(memory)
        return made
