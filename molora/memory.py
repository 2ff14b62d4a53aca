"""The router's causal memory of its input, for each sequence, beside the KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from molora.backend import backend_for, failed

CHUNK = 128


def moving_averages(
    z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """m_t = d m_{t-1} + (1 - d) z_t at each real token, m_t = m_{t-1} at padding.

    Args:
        z: [batch, tokens, width] float32.
        real: [batch, tokens] bool, False at padding.
        decays: [decays] float32 in (0, 1).
        start: [batch, decays, width] float32, m before the first token.

    Returns:
        [batch, tokens, decays, width], m at each token, and [batch, decays, width], m after the last.
    """
    if z.shape[1] == 1:
        new = torch.lerp(z.unsqueeze(1)[:, :, 0], start, decays.view(1, -1, 1))
        new = torch.where(real.view(-1, 1, 1), new, start)
        return new.unsqueeze(1), new
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (z, decays, start))
    if z.shape[1] > 1 and not learning and backend_for(z.device) == "triton":
        try:
            from molora_kernels import averages  # needs Triton

            return averages.moving_averages(z, real, decays, start)
        except Exception as error:  # Triton's own errors have no common class
            if not failed(error):
                raise
    outputs = []
    for first in range(0, z.shape[1], CHUNK):
        here = slice(first, first + CHUNK)
        chunk = _chunk(z[:, here], real[:, here], decays, start)
        outputs.append(chunk)
        start = chunk[:, -1]
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]), start


def _chunk(z: torch.Tensor, real: torch.Tensor, decays: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The same for a few tokens, as one product with the matrix of decays d^(real tokens between)."""
    count = real.cumsum(1).to(z.dtype)  # [B, T] real tokens so far
    between = count.unsqueeze(2) - count.unsqueeze(1)  # [B, T, T]
    visible = (between >= 0) & real.unsqueeze(1) & torch.ones_like(between, dtype=torch.bool).tril()
    log = decays.log().view(1, -1, 1, 1)
    weight = (1 - decays).view(1, -1, 1, 1) * torch.exp(log * between.clamp_min(0).unsqueeze(1)) * visible.unsqueeze(1)
    carried = torch.exp(log * count.view(count.shape[0], 1, -1, 1)) * start.unsqueeze(2)  # [B, decays, T, width]
    return (weight @ z.unsqueeze(1) + carried).transpose(1, 2)


class Rule(Protocol):
    """What a memory keeps of the tokens that it reads."""

    def empty(self, batch: int) -> torch.Tensor:
        """The state [batch, ...] float32 in which nothing is remembered."""

    def __call__(self, z: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is remembered at each of the tokens z [batch, tokens, width] float32, [batch, tokens, size], and the
        state after the last. Where ``real`` [batch, tokens] is False, z is not read and nothing changes."""


@dataclass(frozen=True)
class Averages:
    """Moving averages: see :func:`moving_averages`. decays: [decays] float32."""

    decays: torch.Tensor
    width: int

    def empty(self, batch: int) -> torch.Tensor:
        return self.decays.new_zeros(batch, len(self.decays), self.width)

    def __call__(self, z: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        averages, state = moving_averages(z, real, self.decays, state)
        return averages.flatten(2), state


class Memory:
    """One router's memory for a batch of sequences. It follows its cache: see :mod:`molora.cache`.

    The inputs seen so far are kept beside the state (``width`` float32 numbers a token, about 1% of the keys and
    values), so that a cache that is cropped gets the state of its shorter past back.
    """

    def __init__(self, batch: int, width: int, rule: Rule, owner: object = None) -> None:
        self.owner = owner  # what filled it: another router's memory means nothing
        self.rule = rule
        self.state = rule.empty(batch)  # after the last token
        self.z = self.state.new_empty(batch, 0, width)  # [B, T, width]
        self.real = torch.empty(batch, 0, dtype=torch.bool, device=self.z.device)  # [B, T]

    def __len__(self) -> int:
        return self.z.shape[1]

    @property
    def batch(self) -> int:
        return self.z.shape[0]

    @staticmethod
    def joined(memories: Sequence["Memory"]) -> "Memory":
        """One memory of the sequences of several, which have read as many tokens."""
        first = memories[0]
        found = Memory(0, first.z.shape[2], first.rule, first.owner)
        found.z, found.real, found.state = (
            torch.cat([getattr(memory, name) for memory in memories]) for name in ("z", "real", "state")
        )
        return found

    def part(self, row: int, length: int) -> "Memory":
        """That of one sequence, whose tokens from ``length`` on are padding."""
        found = Memory(0, self.z.shape[2], self.rule, self.owner)
        here = slice(row, row + 1)
        found.z, found.real, found.state = self.z[here, :length], self.real[here, :length], self.state[here]
        return found

    def append(self, z: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Reads new tokens z [batch, tokens, width]; returns what is remembered at them [batch, tokens, size]."""
        remembered, state = self.rule(z, real, self.state)
        self.keep(z, real, state)
        return remembered

    def keep(self, z: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> None:
        """Takes in new tokens, and the state after them, which was computed from this memory's."""
        self.z, self.real = (torch.cat([self.z, z], 1), torch.cat([self.real, real], 1)) if len(self) else (z, real)
        self.state = state

    def crop(self, length: int) -> None:
        """Forgets the tokens from position ``length`` on."""
        if length >= len(self):
            return
        self.z, self.real = self.z[:, :length], self.real[:, :length]
        self.state = self.rule.empty(self.batch)
        if length:
            self.state = self.rule(self.z, self.real, self.state)[1]

    def select(self, indices: torch.Tensor) -> None:
        """Keeps (and reorders) the sequences at ``indices``."""
        indices = indices.to(self.z.device)
        self._map(lambda tensor: tensor[indices])

    def repeat(self, repeats: int) -> None:
        """Repeats each sequence in place."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.z, self.real, self.state = (change(tensor) for tensor in (self.z, self.real, self.state))
