"""Which form a computation takes: up to which size each was the faster one, measured by ``benchmarks/forms.py``."""

from molora_kernels.tiles import fastest_up_to

# Tokens for each of which a program may be better than blocks of tokens with the same slots.
BY_TOKEN = fastest_up_to("by_token")
# Adapters over which all columns of a plan are added at once. A block in one order of all columns meets several of
# them; of more adapters so many, that a pass for each column is faster.
TOGETHER = fastest_up_to("together")
# Ranks of all adapters that training multiplies for every token.
HOT_TRAINED = fastest_up_to("hot_trained")


def by_token(tokens: int) -> bool:
    return tokens <= BY_TOKEN


def together(slots: int) -> bool:
    return slots <= TOGETHER


def hot_trained(ranks: int) -> bool:
    return ranks <= HOT_TRAINED
