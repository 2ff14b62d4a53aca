"""Made-up text in which something can be hidden: nothing in it answers a question."""

import random

_WHO = (
    "The baker", "A gardener", "My neighbour", "The old captain", "A young teacher", "The postman", "Our doctor",
    "The librarian", "A painter", "The night watch", "Her brother", "The shopkeeper", "A traveller", "The mayor",
    "His aunt", "The carpenter",
)  # fmt: skip
_DID = (
    "walked along the river", "opened the green door", "waited for the evening train", "wrote a long letter",
    "swept the yard", "looked for the lost key", "read the paper twice", "fed the grey cat", "mended the roof",
    "sang on the way home", "carried two baskets", "spoke of the weather", "slept until noon", "lit a small lamp",
    "counted the boats", "closed the shutters",
)  # fmt: skip
_WHEN = (
    "before breakfast", "in the rain", "after the market", "on a quiet Sunday", "as every day", "without a word",
    "late in autumn", "when the bells rang", "in spite of the cold", "for the first time", "with great care",
    "and nobody noticed",
)  # fmt: skip
WORDS = (
    "amber", "birch", "cobalt", "delta", "ember", "falcon", "garnet", "harbour", "indigo", "juniper", "kestrel",
    "lantern", "marble", "nectar", "onyx", "pepper", "quartz", "raven", "saffron", "timber", "umber", "velvet",
    "willow", "yarrow", "zephyr", "anchor", "bramble", "copper", "dune", "elm",
)  # fmt: skip
"""Of which names are made."""
_TOKENS_A_SENTENCE = 12  # about


def sentences(chance: random.Random, tokens: int, taken: int) -> list[str]:
    """Those that make a text of about so many tokens with ``taken`` others."""
    return [
        f"{chance.choice(_WHO)} {chance.choice(_DID)} {chance.choice(_WHEN)}."
        for _ in range(max(0, tokens // _TOKENS_A_SENTENCE - taken))
    ]
