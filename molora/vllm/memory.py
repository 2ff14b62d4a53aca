"""The router's memory of every sequence, beside vLLM's KV cache: the state after a token lies where its keys lie.

A KV slot belongs to one sequence as long as its block does, and a block that the prefix cache hands on holds the same
tokens under the same stack. So a sequence goes on from the slot of the token before it, whoever wrote it: an earlier
chunk of the prompt, the last step of decoding, or another request with the same beginning.
"""

import torch

from molora.gates import Gates
from molora.memory import Rule


class SlotMemory:
    """States [slots, size] float32 by KV slot.

    Args:
        slots: of the KV cache.
        device: of the model.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.table = torch.zeros(slots, 0, device=device)

    def widen(self, size: int) -> None:
        """Makes room for a router whose parts remember ``size`` numbers together; what is there stays."""
        if size > self.table.shape[1]:
            wider = self.table.new_zeros(len(self.table), size)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider

    def read(self, slots: torch.Tensor, columns: slice) -> torch.Tensor:
        """[n, columns] of slots [n] int64; where a slot is -1 nothing is remembered, which is 0 in every rule."""
        return self.table[slots.clamp_min(0), columns] * (slots >= 0).unsqueeze(1)

    def write(self, slots: torch.Tensor, columns: slice, states: torch.Tensor) -> None:
        """States [n, tokens, columns] to slots [n, tokens] int64."""
        self.table[slots.flatten(), columns] = states.flatten(0, 1)


class Continued:
    """What :meth:`molora.router.RouterPart.features` takes as a memory: it goes on from given states [n, size] and
    keeps the state after each token in ``states`` [n, tokens, size]."""

    def __init__(self, rule: Rule, begun: torch.Tensor) -> None:
        self.rule = rule
        self.begun = begun
        self.states: torch.Tensor

    def append(self, z: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """What is remembered at the tokens z [n, tokens, width], none of which is padding; [n, tokens, size]."""
        begun = self.begun.view_as(self.rule.empty(len(z)))
        remembered, _ = self.rule(z, real, begun)
        self.states = remembered
        if isinstance(self.rule, Gates):  # whose state has the last z before the averages
            self.states = torch.cat([_last(z, begun, self.rule), remembered], 2)
        return remembered


def _last(z: torch.Tensor, begun: torch.Tensor, rule: Gates) -> torch.Tensor:
    """[n, tokens, back * width]: at each token the last z, newest first, as :func:`molora.gates.gated_averages` keeps
    them after a sequence's last token."""
    tokens, width = z.shape[1:]
    back = rule.gates[0][0].shape[1] // width - 1
    line = torch.cat([begun[:, : back * width].unflatten(1, (back, width)).flip(1), z], 1)
    return torch.cat([line[:, back - k : back - k + tokens] for k in range(back)], 2)
