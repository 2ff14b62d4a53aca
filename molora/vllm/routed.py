"""One exported stack as the worker holds it: from what the router reads and remembers to the gates of its ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from molora import saved
from molora.errors import AdapterFormatError, BackendError, RouterError
from molora.plan import RoutingPlan, forced_plan, layer_tables, route
from molora.router import Router
from molora.stack import SlotTable
from molora.vllm.folder import TABLE, read_manifest
from molora.vllm.memory import Continued, SlotMemory
from molora.vllm.selections import Selections


@dataclass(frozen=True)
class Step:
    """The next tokens of n sequences of one stack and selection.

    choice: the selection, of :func:`molora.vllm.selections.choice_of`.
    before: [n] int64, KV slot of the token before them, -1 where there is none.
    slots: [n, tokens] int64, their KV slots.
    """

    choice: str | None
    before: torch.Tensor
    slots: torch.Tensor


class Reading:
    """A part of the router, and where what it remembers lies among what is kept of a token.

    Args:
        part: of the router.
        first: number of its first column.
    """

    def __init__(self, part: Any, first: int) -> None:
        self.part = part
        self.rule = part.new_memory(1, None).rule
        self.columns = slice(first, first + self.rule.empty(1).numel())

    def logits(self, read: torch.Tensor, step: Step, memory: SlotMemory | None) -> torch.Tensor:
        """[n, tokens, rows] of token ids [n, tokens] int64, or of hidden states [n, tokens, D] where it reads these;
        ``memory`` is advanced by them."""
        z = self.part.read(read) if self.part.reads else self.part.read_ids(read, None)
        begun = z.new_zeros(len(z), 0) if memory is None else memory.read(step.before, self.columns)
        past = Continued(self.rule, begun)
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        logits: torch.Tensor = self.part(self.part.features(z, real, past))
        if memory is not None:
            memory.write(step.slots, self.columns, past.states)
        return logits


class RoutedStack:
    """The router of an exported folder, its selections, and which columns each adapter has.

    ``boundary`` is the decoder layer at which the router reads the hidden state, None where it does not. Modules below
    it act as :meth:`gates` says, and those from it on as :meth:`gates_from`.

    Args:
        folder: of :func:`molora.vllm.export.export`.
        device: of the model.

    Raises:
        AdapterFormatError, RouterError, SelectionError: the folder is damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        manifest = read_manifest(folder)
        selections = Selections(manifest)
        self.adapters = len(selections.slots)
        self.owners = _owners(manifest, selections.slots).to(device)
        self.selection = lru_cache(maxsize=256)(lambda choice: selections.resolve(choice).to(device))
        self.selection(None)
        self.router = saved.load_router(folder, manifest["router"])
        self.readings: list[Reading] = []
        self.size = 0  # of what is remembered after a token
        self.boundary: int | None = None
        if self.router is not None:
            self.router.to(device)
            self.boundary = max(self.router.points) or None
            self.tables = layer_tables(self.router.rows, selections.layers, device)
            parts: Any = self.router.parts
            for part in parts:
                if isinstance(self.router, Router) and part.reads == 0:
                    part.table = _table(folder / TABLE, part.width).to(device)
                self.readings.append(Reading(part, self.size))
                self.size = self.readings[-1].columns.stop

    def gates(self, step: Step, ids: torch.Tensor | None, memory: SlotMemory | None) -> torch.Tensor:
        """Gates [n, tokens, ranks] float32, which hold up to the boundary; ``memory`` is advanced by the step's tokens.

        Args:
            step: of which sequences.
            ids: [n, tokens] int64.
            memory: None where the router remembers nothing.

        Raises:
            BackendError: the router asks for token ids, and there are none.
        """
        if self.readings and self.readings[0].part.reads:  # nothing is routed before it reads
            return self._by_rank(forced_plan(self.selection(step.choice).expand(len(step.slots)), step.slots.shape[1]))
        if ids is None:
            raise BackendError("A routed stack needs token ids: this vLLM runs on embeddings alone.")
        return self._gates(step, ids, 0, memory)

    def gates_from(self, step: Step, hidden: torch.Tensor, memory: SlotMemory | None) -> torch.Tensor:
        """As :meth:`gates`, from the boundary on, by the hidden states [n, tokens, D] that enter it."""
        return self._gates(step, hidden, -1, memory)

    def _gates(self, step: Step, read: torch.Tensor, reading: int, memory: SlotMemory | None) -> torch.Tensor:
        selection = self.selection(step.choice).expand(len(step.slots))
        if not selection.any_routed or self.router is None:
            return self._by_rank(forced_plan(selection, step.slots.shape[1]))
        logits = self.readings[reading].logits(read, step, memory)
        return self._by_rank(route(logits, self.tables, selection, self.router.weights, False))

    def _by_rank(self, plan: RoutingPlan) -> torch.Tensor:
        """[n, tokens, ranks] float32."""
        # One more place, for null in the plan and for the columns that pad the rank.
        weights = plan.weights.new_zeros(*plan.shape[:2], self.adapters + 1)
        weights.scatter_add_(2, plan.slots.masked_fill(plan.slots < 0, self.adapters), plan.weights.contiguous())
        weights[..., self.adapters] = 0
        return weights[..., self.owners]


def _owners(manifest: Mapping[str, Any], slots: SlotTable) -> torch.Tensor:
    """[ranks] int64: the slot of the adapter that has each column, or the number of adapters where it pads."""
    owners = torch.full((manifest["rank"],), len(slots))
    labels = [f"{column['layer']}/{column['adapter']}" for column in manifest["columns"]]
    if labels != [name for name in slots.names if name]:
        raise AdapterFormatError(f"The columns are of {', '.join(labels)}, and the stack has {', '.join(slots.names)}.")
    for label, column in zip(labels, manifest["columns"], strict=True):
        owners[column["first"] : column["first"] + column["count"]] = slots[label]
    return owners


def _table(file: Path, width: int) -> torch.Tensor:
    """[vocabulary, width] float32."""
    try:
        table = load_file(file)["table"]
    except (SafetensorError, OSError, KeyError) as error:
        raise RouterError(f"{file} is missing or damaged ({error}): export the stack again.") from error
    if table.dim() != 2 or table.shape[1] != width or not torch.isfinite(table).all():
        raise RouterError(f"{file} is not for this router: export the stack again.")
    return table
