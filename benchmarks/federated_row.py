"""How near a federation's row of the router comes to the one that is fitted to all text in one place.

    molora train data
    molora train data many
    python -m benchmarks.federated_row puzzles-letter-jumble puzzles-word-sorting puzzles-syllogism

The part of the starter's router that reads embeddings is given samples of its adapters' text. A new row is then fitted
to all conversations of the clients, and another one to their moments. Told are the share of held-out tokens that both
give to the same row, and what either gives to the new one.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from molora import MoLoRAModel, Router
from molora.examples import features_of
from molora.router import SAMPLES
from molora_training.data import Encoded, data_dir, encode_within, read_examples
from molora_training.federated import row
from molora_training.federated.lora import Lora

OTHERS = {"math": "math", "code": "code", "medicine": "medicine", "law": "law", "ukrainian": "continue-ukrainian",
          "none": "commonsense"}  # fmt: skip
LONGEST = 512  # tokens of a conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="+", help="prepared data, of a client each")
    parser.add_argument("--conversations", type=int, default=8, help="of each client")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = MoLoRAModel.from_pretrained("starter", dtype=torch.float32).eval()
    whole: Any = model.router
    before = Router(replace(whole.config, reads=0), whole.rows, whole.hidden_size).eval()
    before.load_state_dict({name: one for name, one in whole.state_dict().items() if name.startswith("parts.0.")})
    model.set_router(before)

    def texts(name: str, split: str, count: int) -> list[Encoded]:
        examples = read_examples(data_dir() / f"{name}.{split}.jsonl")[: 4 * count]
        return encode_within(examples, model.tokenizer, LONGEST, [name])[:count]

    def features(of: Sequence[Encoded]) -> torch.Tensor:
        ids = [one.input_ids[None] for one in of]
        return features_of(model, [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids], 0)

    part: Any = before.parts[0]
    for name, data in OTHERS.items():
        q = features(texts(data, "train", 40))
        part.samples.add(q[torch.randperm(len(q))[:SAMPLES]], before.rows.index(f"domain/{name}"))
    learnt = {name: texts(name, "train", given.conversations) for name in given.clients}
    pooled = copy.deepcopy(before)
    pooled.add_row("domain/new")
    pooled.set_row("domain/new", 0, features([one for own in learnt.values() for one in own]))
    reader = row.read_reader(row.reader_of(before))
    told = [row.moments(reader, model.base, Lora({}, 1.0), None, own) for own in learnt.values()]
    federated = row.with_row(before, model.stack, "domain", "new", torch.stack(told).mean(0)).router
    apart = {
        "clients'": [one for name in given.clients for one in texts(name, "test", 3)],
        "others'": [one for name in OTHERS.values() for one in texts(name, "test", 10)],
    }
    for what, held_out in apart.items():
        q = features(held_out)
        one, other = _rows(pooled, q), _rows(federated, q)
        same, *new = ((one == other).float().mean(), *((rows == 0).float().mean() for rows in (one, other)))
        print(
            f"{what:8} text: {len(q)} tokens, {same:.1%} to the same row; to the new one {new[0]:.1%} by all text, "
            f"{new[1]:.1%} by moments"
        )


def _rows(router: Router, q: torch.Tensor) -> torch.Tensor:
    """Which row of the layer gets each token; 0: the new one."""
    rows = [router.rows.index(f"domain/{name}") for name in ("new", *OTHERS)]
    return router.parts[0](q)[:, rows].argmax(1)


if __name__ == "__main__":
    main()
