"""One exported stack as the worker holds it: from what the router reads and remembers to the plan of its adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from molora import saved
from molora.backend import backend_for
from molora.errors import AdapterFormatError, BackendError, RouterError
from molora.plan import RoutingPlan, forced_plan, layer_tables, route
from molora.router import Router
from molora.selection import LayerCandidates
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

    columns: of each adapter, in the order of its slots. owners: [ranks] int64, the slot of the adapter that has each
    column, or the number of adapters where it pads. boundary: the decoder layer at which the router reads the hidden
    state, None where it does not: modules below it act as :meth:`plan` says, and those from it on as
    :meth:`plan_from`.

    Args:
        folder: of :func:`molora.vllm.export.export`.
        device: of the model.

    Raises:
        AdapterFormatError, RouterError, SelectionError: the folder is damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        manifest = read_manifest(folder)
        selections = Selections(manifest)
        self.columns = _columns(manifest, selections.slots)
        self.owners = torch.full((manifest["rank"],), len(self.columns), device=device)
        for slot, columns in enumerate(self.columns):
            self.owners[columns] = slot
        self.selection = lru_cache(maxsize=256)(lambda choice: selections.resolve(choice).to(device))
        self.selection(None)
        self.router = saved.load_router(folder, manifest["router"])
        self.readings: list[Reading] = []
        self._tokens: Any = None  # how single tokens are routed, where there are kernels for it
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
            if isinstance(self.router, Router) and parts[0].reads == 0 and backend_for(device) == "triton":
                self.by_kernels(selections.layers)

    def by_kernels(self, layers: Sequence[LayerCandidates]) -> None:
        """Single tokens are routed by kernels from now on."""
        from molora.vllm.token_routes import TokenRoutes  # needs Triton

        router: Any = self.router
        softmax = router.weights == "softmax"
        self._tokens = TokenRoutes(router.parts[0], router.rows, layers, softmax, self.readings[0].columns)

    def plan(self, step: Step, ids: torch.Tensor | None, memory: SlotMemory | None) -> RoutingPlan:
        """The plan up to the boundary; ``memory`` is advanced by the step's tokens.

        Args:
            step: of which sequences.
            ids: [n, tokens] int64.
            memory: None where the router remembers nothing.

        Raises:
            BackendError: the router asks for token ids, and there are none.
        """
        if self.readings and self.readings[0].part.reads:  # nothing is routed before it reads
            return forced_plan(self.selection(step.choice).expand(len(step.slots)), step.slots.shape[1])
        if ids is None:
            raise BackendError("A routed stack needs token ids: this vLLM runs on embeddings alone.")
        selection = self.selection(step.choice)
        if self._tokens is not None and memory is not None and ids.shape[1] == 1 and selection.any_routed:
            plan: RoutingPlan = self._tokens.plan(selection, ids[:, 0].contiguous(), step.before, step.slots, memory)
            return plan
        return self._plan(step, ids, 0, memory)

    def plan_from(self, step: Step, hidden: torch.Tensor, memory: SlotMemory | None) -> RoutingPlan:
        """As :meth:`plan`, from the boundary on, by the hidden states [n, tokens, D] that enter it."""
        return self._plan(step, hidden, -1, memory)

    def _plan(self, step: Step, read: torch.Tensor, reading: int, memory: SlotMemory | None) -> RoutingPlan:
        selection = self.selection(step.choice).expand(len(step.slots))
        if not selection.any_routed or self.router is None:
            return forced_plan(selection, step.slots.shape[1])
        logits = self.readings[reading].logits(read, step, memory)
        return route(logits, self.tables, selection, self.router.weights, False)


@dataclass(frozen=True)
class Group:
    """Requests of one stack and selection with as many tokens in a step.

    slot: of vLLM, in which the stack lies. at: [n, tokens] int64, the places of their tokens in the batch.
    """

    stack: RoutedStack
    slot: int
    at: torch.Tensor
    step: Step


def _columns(manifest: Mapping[str, Any], slots: SlotTable) -> list[slice]:
    """Of the adapter in each slot."""
    labels = [f"{column['layer']}/{column['adapter']}" for column in manifest["columns"]]
    if labels != slots.names:
        raise AdapterFormatError(f"The columns are of {', '.join(labels)}, and the stack has {', '.join(slots.names)}.")
    return [slice(column["first"], column["first"] + column["count"]) for column in manifest["columns"]]


def _table(file: Path, width: int) -> torch.Tensor:
    """[vocabulary, width] float32."""
    try:
        table = load_file(file)["table"]
    except (SafetensorError, OSError, KeyError) as error:
        raise RouterError(f"{file} is missing or damaged ({error}): export the stack again.") from error
    if table.dim() != 2 or table.shape[1] != width or not torch.isfinite(table).all():
        raise RouterError(f"{file} is not for this router: export the stack again.")
    return table
