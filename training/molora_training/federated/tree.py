"""Noise on running sums that grows with the logarithm of their number: a binary tree of Gaussian nodes.

Tree aggregation, as DP-FTRL has it (arXiv 2103.00039). The sum of the first t steps is the sum of one node for each 1
in the binary form of t, which covers 2^level steps; each node gets noise once, N(0, std^2 I). A step is below one node
of each level, so a change of one step changes no more nodes than the tree has levels, and a sum has the noise of
popcount(t) of them.
"""

import hashlib
from dataclasses import dataclass, field

import torch


def nodes(step: int) -> list[tuple[int, int]]:
    """(level, index) of the nodes that make up the sum of the first ``step`` steps; index counts nodes of its level."""
    found, start = [], 0
    for level in reversed(range(step.bit_length())):
        if step >> level & 1:
            found.append((level, start >> level))
            start += 1 << level
    return found


@dataclass
class TreeNoise:
    """Noise of one tree, by steps.

    Args:
        std: of each node.
        size: entries of what is summed.
        seed: secret: whoever knows it can take the noise away.
        step: how many steps there were.

    The nodes of the sum so far are kept, log2(step) + 1 at most, each made of the seed, its level and index: so a tree
    that is resumed gives the same noise, and nothing of a node that is no longer needed is left.
    """

    std: float
    size: int
    seed: bytes
    step: int = 0
    kept: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def next(self) -> torch.Tensor:
        """N_t [size], float32, on the sum after one more step."""
        self.step += 1
        now = nodes(self.step)
        self.kept = {node: self.kept[node] if node in self.kept else self._node(node) for node in now}
        return torch.stack(list(self.kept.values())).sum(0)

    def _node(self, node: tuple[int, int]) -> torch.Tensor:
        digest = hashlib.sha256(self.seed + b"/%d/%d" % node).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return self.std * torch.randn(self.size, generator=generator)
