"""Data for training and judging adapters and routers: real text of five domains and two users, and mixes of them."""

from .both import KINDS, both_file
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
    read_conversations,
    read_examples,
    read_mixed,
    write_examples,
)
from .mixed import mix, mix_all_ways, mix_asides, mix_documents, mix_in_a_turn
from .prepare import data_dir, prepare

__all__ = [
    "DOMAINS",
    "IGNORED",
    "KINDS",
    "OTHERS",
    "SPLITS",
    "USERS",
    "Batch",
    "Encoded",
    "Example",
    "MixedExample",
    "Part",
    "Split",
    "both_file",
    "collate",
    "data_dir",
    "encode",
    "encode_within",
    "mix",
    "mix_all_ways",
    "mix_asides",
    "mix_documents",
    "mix_in_a_turn",
    "prepare",
    "read_conversations",
    "read_examples",
    "read_mixed",
    "write_examples",
]
