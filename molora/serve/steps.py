"""Decode steps of rows, captured as CUDA graphs: one for each power of two of sequences at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from molora.backend import failed
from molora.blueprint import Blueprint
from molora.model import MoLoRAModel
from molora.plan import RoutingPlan
from molora.router import Router
from molora.selection import ResolvedSelection
from molora.serve.rows import RowReader, Rows

if TYPE_CHECKING:
    from molora.decode import DecodeStep


class RowSteps:
    """The captured steps of ``rows``. Adapters of shared layers come and go without a new capture, since they act by
    name."""

    def __init__(self, model: MoLoRAModel, rows: Rows) -> None:
        self.model, self.rows = model, rows
        self._steps: dict[tuple[int, int], tuple[object, DecodeStep]] = {}  # by sequences and columns
        self._last: tuple[ResolvedSelection, DecodeStep, list[int]] | None = None  # and the lengths after it
        self._rotary: tuple[Blueprint, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._off = False

    def forget(self) -> None:
        """What the steps hold of the sequences is not theirs any more."""
        self._last = None

    @torch.no_grad()
    def __call__(self, selection: ResolvedSelection, tokens: Sequence[int]) -> torch.Tensor | None:
        """One more token of each of the first rows, within the model's turn under ``selection``.

        Returns:
            Logits [N, vocabulary], overwritten by the next step; None where no captured step serves, and nothing was
            done: without a GPU, for other bases than those of :mod:`molora.blueprint`, for other routers, and where the
            router decides whether an adapter of a shared layer acts.
        """
        count, last = len(tokens), self._last
        self._last = None
        lengths = self.rows.lengths[:count]
        if last is not None and last[0] is selection and last[2] == lengths:
            step = last[1]
        else:
            found = self._step(selection, count)
            if found is None:
                return None
            step = found
            step.routes.start(selection.to(step.ids.device), None)
            step.start_rows(lengths)
        logits = step(torch.tensor(tokens))
        self.rows.lengths[:count] = [length + 1 for length in lengths]
        self._last = (selection, step, self.rows.lengths[:count])
        routing = self.model.routing
        regions = (0,) if step.routes.boundary is None else (0, step.routes.boundary)
        routing.plans = [
            RoutingPlan(slots.unsqueeze(1), weights.unsqueeze(1)) for slots, weights in map(step.routes.plan, regions)
        ]
        return logits[:count]

    @contextmanager
    def reading(self, reader: RowReader) -> Iterator[None]:
        """Forwards within, in the model's turn, read into ``reader`` by few launches where they can."""
        captured, memory = self.model.steps, reader.memory
        plan = captured.blueprint() if not self._off and captured.backend in (None, "triton") else None
        if plan is None or memory is None:
            yield
            return
        if self._rotary is None or self._rotary[0] is not plan:
            self._rotary = (plan, plan.rotary(self.rows.longest))
        with captured.reading(plan, self._rotary[1], reader):
            yield

    def _step(self, selection: ResolvedSelection, count: int) -> "DecodeStep | None":
        captured, router, layers = self.model.steps, self.model.router, self.model.routing.layers
        named = [layer.name for layer in self.model.stack.layers if not layer.routed]
        routed = {layers[index].name for index in selection.routed_layers}
        if (
            self._off
            or captured.backend not in (None, "triton")
            or not (router is None or (isinstance(router, Router) and not router.training))
            or not routed.isdisjoint(named)
        ):
            return None
        plan, memory = captured.blueprint(), self.rows.whole
        if plan is None or memory is None:
            return None
        parts = router._parts if isinstance(router, Router) else []
        if len(self.rows.states) != len(parts):
            return None
        batch = min(1 << (count - 1).bit_length(), self.rows.count)
        more = selection.forced.shape[1] - sum(layer.top_k for layer in layers)
        mark = (captured.signature(plan, named), [state.data_ptr() for state in self.rows.states])
        kept = self._steps.get((batch, more))
        if kept is not None and kept[0] == mark:
            return kept[1]
        from molora.decode import DecodeStep  # needs Triton
        from molora.step_routes import StepRoutes

        self._steps = {size: one for size, one in self._steps.items() if one[0] == mark}
        states = [state[:batch] for state in self.rows.states]
        try:
            routes = StepRoutes(self.model.routing, batch, plan.device, more, named, states)
            step = DecodeStep(plan, captured.groups, routes, batch, self.rows.longest, memory[:, :, :batch])
            step.capture()
        except torch.OutOfMemoryError:
            self._off = True  # the steps of transformers need less
            self._steps.clear()
            return None
        except Exception as error:  # Triton's own errors have no common class
            if not failed(error):
                raise
            self._off = True
            return None
        # A capture may have been what moved memory, such as the table of a router.
        mark = (captured.signature(plan, named), mark[1])
        self._steps[batch, more] = (mark, step)
        return step
