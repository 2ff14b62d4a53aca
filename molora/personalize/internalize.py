"""A document becomes an adapter, in one reading: what is asked about it later is answered without its text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molora.chat import render
from molora.errors import DocumentError
from molora.factors import Factors, cut
from molora.personalize.document_net import DocumentNet, of_text
from molora.personalize.documents import chunks
from molora.routing import decoder_layers, no_further

MOST_TOKENS = 131_072
_AT_ONCE = 8  # chunks that the base reads together


def factors_of(base: Any, tokenizer: Any, net: DocumentNet, text: str, most_rank: int | None = None) -> Factors:
    """The adapter of a document.

    Args:
        base: the frozen model that ``net`` was trained for.
        tokenizer: the base's.
        net: on the base's device.
        text: the document.
        most_rank: to which the chunks' ranks side by side are cut; None: they stay, and memory grows with the text.

    Returns:
        On the base's device, in the network's dtype.

    Raises:
        DocumentError: the text is empty or longer than ``MOST_TOKENS``. HypernetError: another base's network.
    """
    net.check(base, str(base.config.name_or_path or "this base"))
    parts = chunks(text, tokenizer, net.config.chunk)
    if len(parts) * net.config.chunk > MOST_TOKENS:
        raise DocumentError(
            f"The document has more than {MOST_TOKENS:,} tokens, the most that one adapter is made of: give it in "
            f"parts."
        )
    made: list[dict[str, tuple[Tensor, Tensor]]] = []
    with torch.no_grad():
        for first in range(0, len(parts), _AT_ONCE):
            ids, mask = read_as(tokenizer, parts[first : first + _AT_ONCE], base.device)
            made.append(net(states_of(base, ids, mask, net.config.exit), mask))
        every = {n: (torch.cat([m[n][0] for m in made]), torch.cat([m[n][1] for m in made])) for n in made[0]}
        every = net.balanced(every)
        owners = torch.zeros(len(next(iter(every.values()))[0]), dtype=torch.int64, device=base.device)
        factors = of_text(base, net.joined(every, owners, 1), 0)
        return factors if most_rank is None else cut(factors, most_rank)


def read_as(tokenizer: Any, parts: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Chunks as the base reads them, each a question of the user's: int64 [C, N] and bool [C, N], padded on the
    right."""
    rows = [render(tokenizer, [{"role": "user", "content": part}], add_generation_prompt=True) for part in parts]
    tokens = [torch.tensor(tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    lengths = torch.tensor([len(some) for some in tokens])
    mask = torch.arange(pad.shape[1]) < lengths.unsqueeze(1)
    return pad.to(device), mask.to(device)


@torch.no_grad()
def states_of(base: Any, ids: Tensor, mask: Tensor, exit: int) -> Tensor:
    """What enters the first ``exit`` decoder layers, [C, exit, N, hidden]; no layer beyond is run.

    Args:
        ids: int64 [C, N]. mask: bool [C, N], False at padding on the right.
    """
    layers, found = decoder_layers(base)[1], []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers[:exit]]
    try:
        with no_further(layers[exit - 1]):
            base(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found, 1)
