"""Gates of Personalized Pieces: for each module of an adapter a vector that tells the inputs that it was made for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molora.factors import Factors
from molora.personalize.generated import Generated, generated, stacked
from molora_training.data import Encoded
from molora_training.side_by_side import Schedule, learn, picked


def train_gates(
    base: Any,
    adapters: Sequence[Factors],
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    how: Schedule,
    below: Factors | None = None,
) -> list[dict[str, Tensor]]:
    """The gates of frozen adapters, each from what it learnt itself: delta(sigmoid(x . g) x), g at first zero.

    Args:
        base: frozen, on any device.
        adapters: the sharers'. rows: conversations of each of them.
        pad_id: of the tokenizer.
        how: the schedule; its learning rate is 2e-5 in the paper's code.
        below: what acts beneath all of them.

    Returns:
        Of each by module [in], float32, on the CPU.

    Raises:
        NonFiniteError: a loss is not finite.
    """
    own = [
        {name: (nn.Parameter(torch.zeros(A.shape[1], device=base.device)),) for name, (A, _) in one.items()}
        for one in adapters
    ]
    frozen = stacked(adapters, base.device)
    beneath = stacked([] if below is None else [below], base.device)

    @contextmanager
    def act(of: Tensor | None, now: Mapping[str, tuple[Tensor, ...]]) -> Iterator[None]:
        gates = {name: gate for name, (gate,) in now.items()}
        with generated(base, beneath), gated(base, picked(frozen, of), gates):
            yield

    learn(base, own, rows, pad_id, how, act)
    return [{name: gate.detach().cpu() for name, (gate,) in one.items()} for one in own]


@contextmanager
def gated(base: Any, factors: Generated, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """``base`` with adapters behind gates [B, in]; both with a row for each sequence, or one for all."""
    hooks = [
        base.get_submodule(name).register_forward_hook(partial(_gate, A, B, gates[name]))
        for name, (A, B) in factors.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gate(A: Tensor, B: Tensor, gate: Tensor, _: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
    x = inputs[0]  # [B, T, in]
    open_ = torch.sigmoid(x.float() @ gate.unsqueeze(-1)).to(x.dtype)  # [B, T, 1]
    delta = torch.matmul(torch.matmul(x, A.to(x.dtype).transpose(1, 2)), B.to(x.dtype).transpose(1, 2))
    return y + open_ * delta
