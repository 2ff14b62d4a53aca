"""Whether a gain on few held-out conversations is more than chance, by flipping signs.

A version that learnt nothing lowers the loss of a conversation as easily as it raises it. So how often would the gains
come to as much, all together, if each had its sign by the toss of a coin? (The one-sided paired permutation test.)
Where the conversations also chose the best of several steps, chance gives it more often than is told, about twice.
"""

import torch

EXACT = 12  # conversations of which all 2^n ways are counted
DRAWS = 10_000  # ways that are drawn for more of them
_AT_ONCE = 256  # conversations


def by_chance(gains: torch.Tensor, seed: int = 0) -> float:
    """How often chance gives as much as ``gains`` [n], one of each conversation, come to: from 2^-n or 1e-4 to 1."""
    gains = gains.double().cpu()
    # Their sum is no less with some of the signs turned where those alone come to no more than nothing.
    nothing = 1e-12 * gains.abs().sum()  # what rounding leaves
    if len(gains) <= EXACT:
        turned = torch.arange(2 ** len(gains)).unsqueeze(1) >> torch.arange(len(gains)) & 1  # [2^n, n]
        return float((~(turned.double() @ gains > nothing)).double().mean())
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(DRAWS, dtype=torch.float64)
    for part in gains.split(_AT_ONCE):
        sums += torch.randint(2, (DRAWS, len(part)), generator=generator).double() @ part
    return (int((~(sums > nothing)).sum()) + 1) / (DRAWS + 1)  # what was found is one of the ways
