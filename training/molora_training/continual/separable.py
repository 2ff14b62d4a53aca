"""Linear modules with two sets of small LoRA blocks, and the gates that choose of each set one block for a question."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from molora.errors import ConfigError
from molora.layer import linear_size

SETS, BLOCKS = 2, 4
SCALE = 2.0  # alpha over rank, as of a blank adapter
FLOOR = 0.1  # of the mean deviation: what hardly differs within the first task does not choose alone at the next


def block_rank(rank: int) -> int:
    """The rank of each block, where all blocks of a module have ``rank`` together.

    Raises:
        ConfigError: it cannot be shared out evenly.
    """
    if rank < 1 or rank % (SETS * BLOCKS):
        raise ConfigError(
            f"A rank that {SETS * BLOCKS} blocks of smolora share is a multiple of {SETS * BLOCKS}, not {rank}."
        )
    return rank // (SETS * BLOCKS)


@dataclass
class Choice:
    """The block of each set that acts on each sequence of a batch: [B, SETS] int64. None: the base alone answers."""

    blocks: torch.Tensor | None = None

    @contextmanager
    def of(self, blocks: torch.Tensor) -> Iterator[None]:
        """For the time being."""
        self.blocks = blocks
        try:
            yield
        finally:
            self.blocks = None


class Gates:
    """Random projections [SETS, BLOCKS, hidden] of what questions are known by, standardised by the first task."""

    def __init__(self, hidden: int, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.projections = torch.randn(SETS, BLOCKS, hidden, generator=chance)
        self.mean, self.deviation = torch.zeros(SETS, hidden), torch.ones(SETS, hidden)
        self.seen = False

    def see(self, questions: torch.Tensor) -> None:
        """The first task's ``questions`` [n, SETS, hidden], by whose mean and deviation all are standardised; later
        ones change nothing."""
        if self.seen:
            return
        self.mean, deviation = questions.mean(0), questions.std(0, correction=0)
        self.deviation = deviation.maximum(FLOOR * deviation.mean(1, keepdim=True)).clamp_min(1e-12)
        self.seen = True

    def __call__(self, questions: torch.Tensor) -> torch.Tensor:
        """[n, SETS] int64: the blocks of each question."""
        alike = (questions - self.mean) / self.deviation
        return torch.einsum("nsh,sbh->nsb", alike, self.projections).argmax(2)

    @property
    def bytes(self) -> int:
        """What has to be kept."""
        return sum(part.nbytes for part in (self.projections, self.mean, self.deviation))


class SeparableLinear(nn.Module):
    """y = W x + a_0 o_0 + a_1 o_1, o_s = SCALE B_s A_s x of the chosen block, a = softmax([f_0 . o_0, f_1 . o_1]).

    a [SETS, BLOCKS, r, in], b [SETS, BLOCKS, out, r] and f [SETS, out] are float32 and learn, W does not.
    """

    def __init__(self, base_layer: nn.Module, rank: int, choice: Choice, chance: torch.Generator) -> None:
        super().__init__()
        size = linear_size(base_layer)
        assert size is not None
        self.base_layer, self.choice = base_layer.requires_grad_(False), choice
        bound = 1 / math.sqrt(size[0])  # of kaiming_uniform_ with a = sqrt(5), as PEFT draws them
        drawn = (2 * torch.rand(SETS, BLOCKS, rank, size[0], generator=chance) - 1) * bound
        self.a = nn.Parameter(drawn)
        self.b = nn.Parameter(torch.zeros(SETS, BLOCKS, size[1], rank))
        self.f = nn.Parameter(torch.zeros(SETS, size[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [B, T, in]: [B, T, out], in the dtype of the base."""
        found: torch.Tensor = self.base_layer(x)
        blocks = self.choice.blocks
        if blocks is None:
            return found
        sets = torch.arange(SETS, device=blocks.device)
        a, b = self.a[sets, blocks], self.b[sets, blocks]  # [B, SETS, r, in], [B, SETS, out, r]
        low = SCALE * torch.einsum("bti,bsri->btsr", x.to(a.dtype), a)
        # f . (B low) = (f B) . low, and a (B low) = B (a low): the two outputs are never there for themselves
        scores = torch.einsum("btsr,bsr->bts", low, torch.einsum("so,bsor->bsr", self.f, b))
        fused = low * scores.softmax(2).unsqueeze(3)
        return (found + torch.einsum("btsr,bsor->bto", fused, b)).to(found.dtype)
