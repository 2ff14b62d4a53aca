"""Data for training and judging adapters and routers: real text of five domains and two users, and mixes of them."""

from .encode import IGNORED, Batch, Encoded, collate, encode, encode_within
from .items import (
    DOMAINS,
    OTHERS,
    SPLITS,
    USERS,
    Example,
    MixedExample,
    Part,
    Split,
    read_examples,
    read_mixed,
    write_examples,
)
from .mixed import mix, mix_documents, mix_in_a_turn
from .prepare import data_dir, prepare

__all__ = [
    "DOMAINS",
    "IGNORED",
    "OTHERS",
    "SPLITS",
    "USERS",
    "Batch",
    "Encoded",
    "Example",
    "MixedExample",
    "Part",
    "Split",
    "collate",
    "data_dir",
    "encode",
    "encode_within",
    "mix",
    "mix_documents",
    "mix_in_a_turn",
    "prepare",
    "read_examples",
    "read_mixed",
    "write_examples",
]
