"""Gated memory: running averages that each token's own gates make forget, so that a change of subject shows at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from molora.backend import backend_for, failed

REACH = 4  # tokens that the gates see


GateWeights = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""V [2 units, inputs] and b [2 units] float32 of each layer of gates."""


def gated_averages(
    z: torch.Tensor, real: torch.Tensor, gates: GateWeights, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (1 - g_t) h_{t-1} + g_t c_t at each real token, h_t = h_{t-1} at padding, with (g~_t, c_t) = V x_t + b and
    g_t = sigmoid(g~_t), layer after layer: x_t is the z of the last ``reach`` real tokens, newest first, and above the
    first layer also the h_t of the one below.

    After minGRU (arXiv 2410.01201): the gates do not read their own h, so that a layer is one scan over a prompt.

    Args:
        z: [batch, tokens, width] float32, tokens from 1.
        real: [batch, tokens] bool, False at padding.
        gates: of each layer; ``reach * width`` inputs, and above the first as many more as the one below has units.
        state: [batch, (reach - 1) * width + all units] float32 before the first token: the last z, newest first, and
            each layer's h.

    Returns:
        [batch, tokens, all units], h at each token, layer beside layer, and the state after the last.
    """
    learning = torch.is_grad_enabled() and any(
        t.requires_grad for t in (z, state, *(t for pair in gates for t in pair))
    )
    if z.shape[1] > 1 and not learning and backend_for(z.device) == "triton":
        try:
            from molora_kernels.gates import remember_gated  # needs Triton

            _, u, state = remember_gated(z.flatten(0, 1), None, real, gates, state)
            return u[..., z.shape[2] :], state
        except Exception as error:  # Triton's own errors have no common class
            if not failed(error):
                raise
    (tokens, width), back = z.shape[1:], gates[0][0].shape[1] // z.shape[2] - 1
    # Real tokens first, in their order, after those that the state remembers: there "last" means the one before.
    count = real.cumsum(1)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    line = z.gather(1, order.unsqueeze(2).expand_as(z))
    line = torch.cat([state[:, : back * width].unflatten(1, (back, width)).flip(1), line], 1)
    seen = torch.cat([line[:, back - k : back - k + tokens] for k in range(back + 1)], 2)
    here = (torch.arange(tokens, device=z.device) < count[:, -1:]).unsqueeze(2)
    begun = state[:, back * width :].split([len(bias) // 2 for _, bias in gates], 1)
    layers: list[torch.Tensor] = []  # h from before the first token on, [batch, 1 + tokens, units]
    for (weight, bias), start in zip(gates, begun, strict=True):
        x = torch.cat([seen, layers[-1][:, 1:]], 2) if layers else seen
        gate, candidate = nn.functional.linear(x, weight, bias).chunk(2, -1)
        gate = gate.sigmoid().masked_fill(~here, 0)
        layers.append(_scan_from(start, 1 - gate, gate * candidate.masked_fill(~here, 0)))
    h = torch.cat(layers, 2)
    h = h.gather(1, count.unsqueeze(2).expand(-1, -1, h.shape[2]))  # back to the places of the tokens
    newest = count[:, -1:] + back - 1 - torch.arange(back, device=z.device)
    past = line.gather(1, newest.unsqueeze(2).expand(-1, -1, width))
    return h, torch.cat([past.flatten(1), h[:, -1]], 1)


def _scan_from(start: torch.Tensor, keep: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """[B, 1 + T, units]: start [B, units] and h_t = keep_t h_{t-1} + new_t, of [B, T, units]."""
    start = start.unsqueeze(1)
    found: torch.Tensor = _Scan.apply(torch.cat([torch.zeros_like(start), keep], 1), torch.cat([start, new], 1))
    return found


class _Scan(torch.autograd.Function):
    """h_t = keep_t h_{t-1} + new_t along dimension 1, in log2 T steps; its gradient is the same scan from the end."""

    @staticmethod
    def forward(ctx: Any, keep: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        h = _scan(keep, new)
        ctx.save_for_backward(keep, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep, h = ctx.saved_tensors
        later = torch.cat([keep[:, 1:], torch.zeros_like(keep[:, :1])], 1)
        grad = _scan(later.flip(1), grads[0].flip(1)).flip(1)
        return grad * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1), grad


def _scan(keep: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    shift = 1
    while shift < keep.shape[1]:
        new = torch.cat([new[:, :shift], new[:, shift:] + keep[:, shift:] * new[:, :-shift]], 1)
        keep = torch.cat([keep[:, :shift], keep[:, shift:] * keep[:, :-shift]], 1)
        shift *= 2
    return new


@dataclass(frozen=True)
class Gates:
    """The rule of a gated memory: see :func:`gated_averages`."""

    gates: GateWeights
    width: int

    def empty(self, batch: int) -> torch.Tensor:
        past = self.gates[0][0].shape[1] - self.width
        return self.gates[0][1].new_zeros(batch, past + sum(len(bias) // 2 for _, bias in self.gates))

    def __call__(self, z: torch.Tensor, real: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_averages(z, real, self.gates, state)
