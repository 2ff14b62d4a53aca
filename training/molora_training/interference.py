"""What adapters cost each other: the loss of each one's data while another acts too."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.errors import DataError
from molora.factors import Factors, concatenated
from molora.personalize.generated import generated, stacked
from molora_training.adapter_run import answer_count
from molora_training.data import Encoded, encode_within, read_conversations
from molora_training.speaker import Speaker

SPLITS = ("test", "validation")  # the first that is there is read
LONGEST = 1024  # tokens of a conversation; longer ones are left out


def losses(
    base: Any,
    tokenizer: Any,
    adapters: Mapping[str, Factors],
    rows: Mapping[str, Sequence[Encoded]],
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """float64 [N, N + 1], nats per answer token of adapter i's rows: in column j with i and j at work, i alone where j
    is i, and in the last column of the base alone. NaN for an adapter without rows.

    Args:
        base: as loaded; hooks are put on it and taken off again.
        adapters: in the order of the rows and columns.
        rows: by the adapters' names.
        on_step: is told how many numbers are there, and of how many.
    """
    done, total = 0, sum(bool(rows.get(name)) for name in adapters) * (len(adapters) + 1)
    speaker = Speaker(base, tokenizer)
    found = torch.full((len(adapters), len(adapters) + 1), torch.nan, dtype=torch.float64)
    for i, (name, factors) in enumerate(adapters.items()):
        acting: list[Factors] = [concatenated([factors, one]) for one in adapters.values()]
        acting[i] = factors
        for column, one in enumerate([*acting, None] if rows.get(name) else []):
            with generated(base, {} if one is None else stacked([one], base.device)):  # one for all rows of a batch
                summed, tokens = speaker.losses(rows[name]).sum(0)
            found[i, column] = summed / tokens
            done += 1
            if on_step is not None:
                on_step(done, total)
    return found


def read_rows(folder: Path, names: Collection[str], tokenizer: Any, limit: int) -> dict[str, list[Encoded]]:
    """The first ``limit`` conversations of NAME.test.jsonl, or else NAME.validation.jsonl, for the names that have such
    a file with answers in it. NAME is what a label ends in.

    Raises:
        DataError: none has.
    """
    found = {}
    for name in names:
        files = [folder / f"{name.rsplit('/', 1)[-1]}.{split}.jsonl" for split in SPLITS]
        file = next((file for file in files if file.is_file()), None)
        rows = [] if file is None else _rows(file, tokenizer, limit)
        if rows:
            found[name] = rows
    if not found:
        raise DataError(
            f"{folder} holds no data of {', '.join(names)}: no NAME.test.jsonl or NAME.validation.jsonl with an answer."
        )
    return found


def _rows(file: Path, tokenizer: Any, limit: int) -> list[Encoded]:
    examples = read_conversations(file)
    names = sorted({domain for example in examples for domain in example.domains})
    each = (row for example in examples for row in encode_within([example], tokenizer, LONGEST, names))
    return list(islice((row for row in each if answer_count(row)), limit))
