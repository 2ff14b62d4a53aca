"""What a process's means over its part of a step count for in the means over the whole step."""

from collections.abc import Sequence

import torch

from molora_training.processes import Processes


class Shares:
    """By what the terms of a part are multiplied, so that their sum over the processes is that of the whole step.

    The tensor of the shares stays where it is, and captured steps read it there.

    Args:
        names: of the sizes by which the terms are means.
        processes: those that do a step together.
    """

    def __init__(self, names: Sequence[str], processes: Processes) -> None:
        self.at = {name: index for index, name in enumerate(names)}
        self.processes = processes
        self.values = torch.ones(len(names), device=processes.device)
        self.parts = True  # of a step; False: every batch is the whole of what its means are about

    def see(self, sizes: torch.Tensor) -> None:
        """Before a step: the sizes [names] of this process's part of it; zeros where it has none."""
        self.values.copy_(sizes / self.processes.total(sizes).clamp_min(torch.finfo(torch.float32).tiny))

    def of(self, mean: torch.Tensor, name: str) -> torch.Tensor:
        """A mean's part of that over the whole step."""
        return mean * self.values[self.at[name]] if self.parts else mean

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Over the whole step, of values that are parts of it."""
        return self.processes.total(values) if self.parts else values
