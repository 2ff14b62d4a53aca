"""One exported stack as the worker holds it: from tokens and what the router remembers to the gates of its ranks."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from molora import saved
from molora.errors import AdapterFormatError, RouterError
from molora.plan import forced_plan, layer_tables, route
from molora.router import Router
from molora.stack import SlotTable
from molora.vllm.folder import TABLE, read_manifest
from molora.vllm.memory import Continued, SlotMemory
from molora.vllm.selections import Selections


class RoutedStack:
    """The router of an exported folder, its selections, and which columns each adapter has.

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
        self.size = 0  # of what is remembered after a token
        if self.router is not None:
            self.router.to(device)
            parts: Any = self.router.parts
            self.part = parts[0]
            self.tables = layer_tables(self.router.rows, selections.layers, device)
            self.rule = self.part.new_memory(1, None).rule
            self.size = self.rule.empty(1).numel()
            if isinstance(self.router, Router):
                self.part.table = _table(folder / TABLE, self.part.width).to(device)

    def gates(
        self,
        choice: str | None,
        ids: torch.Tensor,
        before: torch.Tensor,
        slots: torch.Tensor,
        memory: SlotMemory | None,
    ) -> torch.Tensor:
        """Gates [n, tokens, ranks] float32 of the next tokens of n sequences; ``memory`` is advanced by them.

        Args:
            choice: the sequences' selection, of :func:`molora.vllm.selections.choice_of`.
            ids: [n, tokens] int64.
            before: [n] int64, KV slot of the token before them, -1 where there is none.
            slots: [n, tokens] int64, their KV slots.
            memory: None where the router remembers nothing.
        """
        n, tokens = ids.shape
        selection = self.selection(choice).expand(n)
        if selection.any_routed and self.router is not None:
            plan = route(self._logits(ids, before, slots, memory), self.tables, selection, self.router.weights, False)
        else:
            plan = forced_plan(selection, tokens)
        # One more place, for null in the plan and for the columns that pad the rank.
        weights = torch.zeros(n, tokens, self.adapters + 1, device=ids.device)
        weights.scatter_add_(2, plan.slots.masked_fill(plan.slots < 0, self.adapters), plan.weights.contiguous())
        weights[..., self.adapters] = 0
        return weights[..., self.owners]

    def _logits(
        self, ids: torch.Tensor, before: torch.Tensor, slots: torch.Tensor, memory: SlotMemory | None
    ) -> torch.Tensor:
        """[n, tokens, rows]."""
        begun = torch.zeros(len(ids), 0, device=ids.device) if memory is None else memory.read(before, self.size)
        past = Continued(self.rule, begun)
        real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        logits: torch.Tensor = self.part(self.part.features(self.part.read_ids(ids, None), real, past))
        if memory is not None:
            memory.write(slots, past.states)
        return logits


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
