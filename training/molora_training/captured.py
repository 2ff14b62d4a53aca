"""Forward and backward of a training step as CUDA graphs: one for each shape of batch that comes again.

A training step over a frozen base is thousands of small calls, which the host is slower to make than a GPU to run.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from molora_training.batches import rounded
from molora_training.data import IGNORED

_log = logging.getLogger(__name__)
OFTEN = 10  # times that a shape has to come: a capture takes as long as a few steps, and memory of its own
_FILLERS = {"attention_mask": 0, "labels": IGNORED, "segments": -1, "domain_ids": -1}  # 0: any token


class CapturedSteps:
    """Runs steps of ``objective``; what it runs must not wait for the device.

    Args:
        objective: gives terms of a batch, ``loss`` among them. A batch is a dataclass of tensors [B, T], ``input_ids``
            and what else _FILLERS tells how to fill.
        parameters: what it trains. After a step their ``grad`` is the step's own, whatever it was before.
        batch_tokens: what batches are planned for; they are filled up to it.
        worth: shapes that come often enough; the others are run as they are. None: all are.
    """

    def __init__(
        self,
        objective: Callable[[Any], dict[str, torch.Tensor]],
        parameters: Iterable[nn.Parameter],
        batch_tokens: int,
        worth: Collection[tuple[int, int]] | None = None,
    ) -> None:
        self.objective, self.parameters, self.batch_tokens = objective, list(parameters), batch_tokens
        self.worth = worth
        self.pool = torch.cuda.graph_pool_handle()
        self.able = True
        self._steps: dict[torch.Size, _Step | None] = {}  # None: the shape came once

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        """Terms of a batch, which the next step of its shape overwrites, and the gradients of its loss."""
        sequences, tokens = batch.input_ids.shape
        if self.worth is not None and filled_shape(sequences, tokens, self.batch_tokens) not in self.worth:
            return self._run(batch)
        batch = filled(batch, self.batch_tokens)
        shape = batch.input_ids.shape
        step = self._steps.get(shape)
        if step is None and shape in self._steps and self.able:
            step = self._capture(batch)
        if step is None:
            self._steps[shape] = None
            return self._run(batch)
        return step(batch, self.parameters)

    def _run(self, batch: Any) -> dict[str, torch.Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        terms: dict[str, torch.Tensor] = self.objective(batch)
        terms["loss"].backward()
        return {name: value.detach() for name, value in terms.items()}

    def _capture(self, batch: Any) -> "_Step | None":
        batch = type(batch)(**{name: tensor.clone() for name, tensor in vars(batch).items()})
        before = torch.cuda.get_sync_debug_mode()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            # What is made once is made here, and not in the graph; and what waits for the device is found here, since a
            # capture that fails leaves the random generator unusable.
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(side):
                self._run(batch)
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.empty_cache()  # what steps that are not captured leave does not serve the graphs
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of the device, NCCL's watchdog among them, is no part of the step and does no harm.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                terms = self._run(batch)
        except RuntimeError as error:
            _log.warning("Training steps are not captured in CUDA graphs, and slower: %s", error)
            self.able = False
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
        step = self._steps[batch.input_ids.shape] = _Step(graph, batch, terms, [p.grad for p in self.parameters])
        return step


class _Step:
    """A captured step with the memory that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        batch: Any,
        terms: dict[str, torch.Tensor],
        gradients: list[torch.Tensor | None],
    ) -> None:
        self.graph, self.batch, self.terms, self.gradients = graph, batch, terms, gradients

    def __call__(self, batch: Any, parameters: list[nn.Parameter]) -> dict[str, torch.Tensor]:
        for name, tensor in vars(self.batch).items():
            tensor.copy_(getattr(batch, name))
        self.graph.replay()
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.terms


def worth_capturing(plan: Iterable[Sequence[int]], batch_tokens: int) -> set[tuple[int, int]]:
    """Shapes that come OFTEN in a plan, which has the lengths of each batch."""
    shapes = Counter(filled_shape(len(lengths), max(lengths), batch_tokens) for lengths in plan)
    return {shape for shape, count in shapes.items() if count >= OFTEN}


def filled_shape(sequences: int, tokens: int, batch_tokens: int) -> tuple[int, int]:
    """As many tokens as the length is rounded to, and as many sequences as then fit."""
    wanted = rounded(tokens)
    return max(sequences, batch_tokens // wanted), wanted


def filled(batch: Any, batch_tokens: int) -> Any:
    """The batch with padding, of :func:`filled_shape`."""
    sequences, tokens = batch.input_ids.shape
    most, wanted = filled_shape(sequences, tokens, batch_tokens)
    pads = (0, wanted - tokens, 0, most - sequences)
    return type(batch)(
        **{name: nn.functional.pad(tensor, pads, value=_FILLERS.get(name, 0)) for name, tensor in vars(batch).items()}
    )
