"""Keys, values and router memories of many sequences that come and go: each has a row, and rows have their own lengths.

A new sequence reads its prompt into its row in place; a sequence that ends leaves its row to the last one. So the
sequences of a step are always the first rows, nothing is padded, and nothing is copied while they run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from molora.cache import attach
from molora.errors import BaseModelError
from molora.memory import Memory
from molora.step_cache import CountedCache, StepLayer


class Rows:
    """Memory of ``count`` rows of up to ``longest`` tokens.

    Raises:
        BaseModelError: the base keeps something else than the keys and values of all tokens.
    """

    def __init__(self, base: PreTrainedModel, count: int, longest: int) -> None:
        self.count, self.longest = count, longest
        kinds = _shapes(base, longest)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, [rows, heads, longest, width]
        self.whole: torch.Tensor | None = None  # [layers, 2, rows, heads, longest, width], where all are alike
        first = kinds[0][0]
        if all(one.shape == first.shape and one.dtype == first.dtype for pair in kinds for one in pair):
            _, heads, _, width = first.shape
            self.whole = first.new_zeros(len(kinds), 2, count, heads, longest, width)
            self.memory = [(keys, values) for keys, values in self.whole]
        else:
            self.memory = [
                (
                    keys.new_zeros(count, keys.shape[1], longest, keys.shape[3]),
                    values.new_zeros(count, values.shape[1], longest, values.shape[3]),
                )
                for keys, values in kinds
            ]
        self.lengths = [0] * count  # tokens in each row
        self.states: list[torch.Tensor] = []  # by part of the router, [rows, ...] float32
        self._owners: list[object] = []
        self._rules: list[Any] = []

    def reader(self, row: int) -> "RowReader":
        """A cache of one sequence, whose keys and values are the row's."""
        return self._reader(slice(row, row + 1))

    def _reader(self, here: slice) -> "RowReader":
        reader = RowReader([StepLayer(keys[here], values[here]) for keys, values in self.memory])
        self._show(reader, here)
        return reader

    def _show(self, reader: "RowReader", here: slice) -> None:
        reader.parts = self._parts(here)
        reader.memory = None if self.whole is None else self.whole[:, :, here]

    def _parts(self, here: slice) -> list[torch.Tensor]:
        """Keys and values of rows, in as few tensors as they lie in; their last dimension but one is the tokens."""
        if self.whole is not None:
            return [self.whole[:, :, here]]
        return [of[here] for pair in self.memory for of in pair]

    def together(self, first: int, readers: Sequence["RowReader"]) -> "RowReader":
        """One cache of the readers of rows ``first`` and following, which have read as many tokens each."""
        joint = self._reader(slice(first, first + len(readers)))
        joint.advance(readers[0].length)
        if joint.length:
            parts = zip(*(getattr(reader, "routing_memories", []) for reader in readers), strict=True)
            joint.remember([Memory.joined(of) for of in parts])
        return joint

    def apart(self, joint: "RowReader", readers: Sequence["RowReader"], lengths: Sequence[int]) -> None:
        """Gives each reader what ``joint`` has read for it, up to its own length; behind that it is padding."""
        for row, (reader, length) in enumerate(zip(readers, lengths, strict=True)):
            reader.advance(length - reader.length)
            reader.remember([memory.part(row, length) for memory in getattr(joint, "routing_memories", [])])

    def finish(self, row: int, reader: "RowReader") -> None:
        """The prompt is read: what the router remembers of it goes beside the row."""
        self.lengths[row] = reader.length
        memories: list[Memory] = getattr(reader, "routing_memories", [])
        if [memory.owner for memory in memories] != self._owners:
            self._owners, self._rules = [memory.owner for memory in memories], [memory.rule for memory in memories]
            self.states = [memory.rule.empty(self.count) for memory in memories]
        for state, memory in zip(self.states, memories, strict=True):
            state[row] = memory.state[0]

    def move(self, source: int, target: int) -> None:
        """Puts what a row holds into another one."""
        length = self.lengths[source]
        rows = (self._parts(slice(row, row + 1)) for row in (source, target))
        for there, here in zip(*rows, strict=True):
            here[..., :length, :] = there[..., :length, :]
        for state in self.states:
            state[target] = state[source]
        self.lengths[target] = length

    def shift(self, reader: "RowReader", source: int, target: int) -> None:
        """Moves a sequence that is being read to another row."""
        self.lengths[source] = reader.length
        self.move(source, target)
        for layer, (keys, values) in zip(reader.layers, self.memory, strict=True):
            layer.keys, layer.values = keys[target : target + 1], values[target : target + 1]
        self._show(reader, slice(target, target + 1))

    def wipe(self, row: int) -> None:
        """Forgets numbers that may not be finite: what is not attended to counts as zero times its values."""
        for part in self._parts(slice(row, row + 1)):
            part.zero_()
        for state in self.states:
            state[row] = 0

    def step(self, count: int) -> "RowsStep":
        """The cache of one step of the first ``count`` rows: each gets one more token."""
        return RowsStep(self, count)


class RowReader(CountedCache):
    """A prompt's cache, which writes into a row. memory: all layers' keys and values at once, if they are alike.
    parts: the same, or those of each layer; their last dimension but one is the tokens."""

    memory: torch.Tensor | None = None
    parts: list[torch.Tensor]

    def __init__(self, layers: list[StepLayer]) -> None:
        super().__init__(layers=list(layers))

    def back(self, length: int) -> None:
        """Forgets what was read from position ``length`` on."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
        for memory in getattr(self, "routing_memories", []):
            memory.crop(length)

    def remember(self, memories: list[Memory]) -> None:
        """What the router remembers of the tokens that the row was given, by part."""
        if hasattr(self, "routing_memories"):
            self.routing_memories = memories
        elif memories:
            attach(self, memories)


class RowsStep(Cache):
    """The cache of one step, made for it and then let go."""

    unpadded = True  # whatever the mask hides, each row's token is one that the router reads

    def __init__(self, rows: Rows, count: int) -> None:
        lengths = rows.lengths[:count]
        device = rows.memory[0][0].device
        self.longest = max(lengths)
        self.even = min(lengths) == self.longest
        self.positions = torch.tensor(lengths, device=device)  # [N]
        at = (torch.arange(count, device=device), self.positions)
        super().__init__(layers=[_StepRows(keys, values, at, self.longest) for keys, values in rows.memory])
        self.routing_memories = [
            _RowsMemory(state[:count], rule, owner, self.longest)
            for state, rule, owner in zip(rows.states, rows._rules, rows._owners, strict=True)
        ]
        self._rows, self._count = rows, count

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[N, 1, 1, longest + 1], what each row's token may attend to: bool, or of a float ``dtype`` to be added."""
        if self.even:
            return None
        columns = torch.arange(self.longest + 1, device=self.positions.device)
        seen = (columns <= self.positions.unsqueeze(1))[:, None, None]
        if dtype == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def done(self) -> None:
        """The step was run."""
        for row in range(self._count):
            self._rows.lengths[row] += 1


class _StepRows(StepLayer):
    """One layer's first rows, each of which gets a token at its own place."""

    is_compileable = False

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor], longest: int
    ) -> None:
        super().__init__(keys, values)
        self.at, self.length = at, longest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        rows, places = self.at
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        count, end = len(rows), self.length + 1
        return self.keys[:count, :, :end], self.values[:count, :, :end]


class _RowsMemory(Memory):
    """The router's memory of rows for one step: its state alone, which is never cropped."""

    def __init__(self, state: torch.Tensor, rule: Any, owner: object, length: int) -> None:
        self.state, self.rule, self.owner, self._length = state, rule, owner, length

    def __len__(self) -> int:
        return self._length

    @property
    def batch(self) -> int:
        return len(self.state)

    def keep(self, z: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> None:
        self.state.copy_(state)


@torch.no_grad()
def _shapes(base: PreTrainedModel, longest: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer, the keys and values of one token."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ()
    if window is not None and window < longest and ("sliding_attention" in types or not types):
        raise BaseModelError(
            f"{type(base).__name__} attends to {window} tokens in some layers: sequences can be up to {window} tokens "
            f"here, not {longest}."
        )
    cache = DynamicCache()  # without the config its layers keep all
    token = torch.zeros(1, 1, dtype=torch.int64, device=base.get_input_embeddings().weight.device)
    base(input_ids=token, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise BaseModelError(f"{type(base).__name__} keeps more than keys and values: it cannot be served so.")
        found.append((layer.keys, layer.values))
    if len(found) != config.num_hidden_layers:
        raise BaseModelError(f"{type(base).__name__} keeps more than keys and values: it cannot be served so.")
    return found
