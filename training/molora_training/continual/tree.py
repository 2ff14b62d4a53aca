"""The most similar of earlier tasks, found with few comparisons: a tree of tasks, and a bandit that goes down in it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """Tasks of which the ``near`` ones are more like their mean than the ``far`` ones; a leaf has neither."""

    tasks: tuple[int, ...]
    near: "Node | None" = None
    far: "Node | None" = None


def split(vectors: Tensor, tasks: tuple[int, ...], depth: int = 0) -> Node:
    """A KD-tree as in the code of TreeLoRA's authors: level l looks at layer l, and parts tasks at the median of their
    products with the mean of their vectors, the lower one of two. Where all are alike the first half is near.

    Args:
        vectors: [all tasks, layers, size]. tasks: those to be split. depth: the layer to begin with.
    """
    if len(tasks) < 2 or depth == vectors.shape[1]:
        return Node(tasks)
    here = vectors[list(tasks), depth]
    products = here @ here.mean(0)
    is_near = (products >= products.median()).tolist()
    near = tuple(task for task, one in zip(tasks, is_near, strict=True) if one)
    far = tuple(task for task in tasks if task not in near)
    if not far:
        near, far = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
    return Node(tasks, split(vectors, near, depth + 1), split(vectors, far, depth + 1))


class Bandit:
    """Compares each sample of a new task with one earlier task, the one that may be the most similar.

    A comparison costs half the L1 distance of two vectors that are scaled to an L1 norm of 1: 0 to 1, the mean over
    layers. Round t of T goes down the tree to the child with the lower confidence bound

        mean of its tasks' costs - sqrt(log(2 T (t + 1) (t + 2)) / (2 n)),  t from 0,

    n being how often they were compared; what never was comes first.

    Args:
        vectors: of each earlier task [tasks, layers, size].
        rounds: T, how many samples will come.
    """

    def __init__(self, vectors: Tensor, rounds: int) -> None:
        self.vectors, self.rounds = unit(vectors), rounds
        self.root = split(self.vectors, tuple(range(len(vectors))))
        self.counts = [0] * len(vectors)
        self.costs = torch.zeros(vectors.shape[:2], dtype=torch.float64)  # [tasks, layers], summed

    def see(self, sample: Tensor) -> int:
        """One round with a sample [layers, size]; which task it was compared with."""
        node = self.root
        while node.near and node.far:
            node = min(node.near, node.far, key=lambda child: self.bound(child.tasks))
        task = min(node.tasks, key=lambda one: self.bound((one,)))
        self.costs[task] += (unit(sample) - self.vectors[task]).abs().sum(-1).double().cpu() / 2
        self.counts[task] += 1
        return task

    def bound(self, tasks: tuple[int, ...]) -> float:
        """The lower confidence bound of some tasks' cost."""
        count, done = sum(self.counts[task] for task in tasks), sum(self.counts)
        if not count:
            return -math.inf
        mean = float(self.costs[list(tasks)].mean(1).sum()) / count
        return mean - math.sqrt(math.log(2 * self.rounds * (done + 1) * (done + 2)) / (2 * count))

    def nearest(self) -> list[int]:
        """Of each layer the task of the least mean cost."""
        counts = torch.tensor(self.counts).unsqueeze(1)
        found: list[int] = torch.where(counts > 0, self.costs / counts, math.inf).argmin(0).tolist()
        return found


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., size] with an L1 norm of 1; zeros stay zeros."""
    return vectors / vectors.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
