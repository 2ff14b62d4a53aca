"""Several processes that share one training: of each step every one does a part, and the parts add up to the whole.

A loss is a mean over what a step holds. Each process divides what is its own by the size of the whole step; summed over
the processes, losses and gradients are then those of one process that does the step alone. So a training may be gone on
with by another number of processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import nn

from molora.errors import ConfigError

Item = TypeVar("Item")


class Processes:
    """Those that ``accelerate launch`` or ``torchrun`` started together; one that was started alone is one of one.

    Every process has to call what adds up (:meth:`total`, :meth:`figures`, :meth:`sum_gradients`, :meth:`same`,
    :meth:`wait`) the same number of times.
    """

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process  # which alone writes
        self.device: torch.device = self.accelerator.device

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items, which may be none: every so many-th, so that lengths in order are spread evenly."""
        return items[self.rank :: self.count]

    def stretch(self, items: int) -> range:
        """This process's places of so many, where neighbours have to stay together."""
        return range(items * self.rank // self.count, items * (self.rank + 1) // self.count)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, without a gradient; of one process what it gives."""
        return values if self.count == 1 else self.accelerator.reduce(values.detach(), "sum")

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over processes, which may know different names."""
        if self.count == 1:
            return dict(sums)
        found: dict[str, float] = {}
        for one in gather_object([dict(sums)]):
            for name, value in one.items():
                found[name] = found.get(name, 0.0) + value
        return found

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process's ``grad`` becomes the sum of all; one that no process has stays None."""
        if self.count == 1:
            return
        some = list(parameters)
        there = torch.tensor([float(p.grad is not None) for p in some], device=self.device)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in some]
        summed = self.total(torch.cat([there, *flat]))
        anywhere, *parts = summed.split([len(some), *(p.numel() for p in some)])
        for has, parameter, part in zip(anywhere, some, parts, strict=True):
            if parameter.grad is not None or has:  # what is here need not be waited for
                parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def same(self, tensors: Iterable[torch.Tensor]) -> None:
        """All processes take over the first one's values."""
        broadcast([tensor.data for tensor in tensors])

    def wait(self) -> None:
        """For all processes."""
        self.accelerator.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others run the block when the first one has: what it fetched or wrote is there."""
        with self.accelerator.main_process_first():
            yield

    def need(self, items: int, what: str) -> None:
        """Raises ConfigError where a step has fewer items than there are processes."""
        if items < self.count:
            raise ConfigError(
                f"There are {self.count} processes, and a step has {items} {what}: start fewer processes, or set "
                f"{what} to {self.count} or more."
            )
