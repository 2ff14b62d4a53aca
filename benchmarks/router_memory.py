"""What a router should remember: running averages, averages that a gate steers, or a small GRU.

python -m benchmarks.router_memory            # hours on two CPU cores, minutes on a GPU; --steps 20 for a look

Routers that read embeddings alone learn which domain a token is of, from the mixed text of the nine domains of
`configs/quality.yaml`; no adapter runs. Printed: the share of answer tokens that go to their own domain, on the
validation split, by which a memory is to be chosen, and on the test split ("right").
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora import RouterConfig
from molora.base import DEFAULT_BASE, load_base
from molora.router import RouterPart
from molora_training.batches import plan_pass, plan_steps
from molora_training.data import (
    IGNORED,
    Encoded,
    collate,
    data_dir,
    encode_within,
    mix,
    mix_documents,
    mix_in_a_turn,
    read_examples,
)
from molora_training.report import heading, write_report
from molora_training.schedule import warm_cosine

DOMAINS = ("math", "code", "medicine", "law", "ukrainian", "science", "reading", "commonsense", "puzzles")
WAYS = {"turns": (mix, 3000), "documents": (mix_documents, 2000), "two in a turn": (mix_in_a_turn, 2000)}
TEST, TOKENS, WIDTH, HIDDEN, RATE = 200, 8192, 128, 512, 1e-3
FIVE = (0.5, 0.8, 0.9, 0.95, 0.98)
MEMORIES: dict[str, dict[str, Any]] = {
    "none": {"decays": ()},
    "two averages": {"decays": (0.8, 0.95)},
    "five averages": {"decays": FIVE},
    "five averages, learnt decays": {"decays": FIVE, "learn_decays": True},
    "gated averages, 128 units": {"gated": 128},
    "gated averages, 128 units, gates of four tokens": {"units": 128, "depth": 1},
    "gated averages, two layers of 128": {"gated": 128, "layers": 2},
    "gated averages, two layers of 128, gates of four tokens": {"units": 128, "depth": 2},
    "GRU, 128 units": {"gru": 128},
}


class GruPart(nn.Module):
    """A router's part with the state of a GRU in place of the averages."""

    def __init__(self, units: int, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.part = RouterPart(RouterConfig(width=WIDTH, hidden=HIDDEN, decays=()), 0, rows, hidden_size)
        self.part.input = nn.Linear(WIDTH + units, HIDDEN)
        self.gru = nn.GRU(WIDTH, units, batch_first=True)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        z = self.part.read(x)
        state = self.gru(z)[0]  # padding is on the right: it reaches no real token
        return self.part(nn.functional.silu(self.part.input(torch.cat([z, state], -1))))


class GatedPart(nn.Module):
    """A router's part whose averages forget by a gate that the token itself opens (after minGRU, arXiv 2410.01201):
    h_t = (1 - g_t) h_{t-1} + g_t c_t with g_t and c_t of the token's own z alone: what a router has, but for the three
    tokens before. In two layers the second one's gates read the first one's state."""

    def __init__(self, units: int, layers: int, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.part = RouterPart(RouterConfig(width=WIDTH, hidden=HIDDEN, decays=()), 0, rows, hidden_size)
        self.part.input = nn.Linear(WIDTH + layers * units, HIDDEN)
        sizes = [WIDTH] + [WIDTH + units] * (layers - 1)
        self.layers = nn.ModuleList(nn.Linear(size, 2 * units) for size in sizes)
        for layer in self.layers:  # from gates that forget half within 3 tokens to such that keep half over 70
            layer.bias.data[:units] = torch.linspace(-1.4, -4.6, units)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        z = self.part.read(x)
        states: list[torch.Tensor] = []
        for layer in self.layers:
            gate, candidate = layer(torch.cat([z, *states[-1:]], -1)).chunk(2, -1)
            gate = gate.sigmoid()
            states.append(_scan(1 - gate, gate * candidate))
        return self.part(nn.functional.silu(self.part.input(torch.cat([z, *states], -1))))


def _scan(keep: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """h_t = keep_t h_{t-1} + new_t, [B, T, units], in log2 T steps."""
    shift = 1
    while shift < keep.shape[1]:
        before = nn.functional.pad(new[:, :-shift], (0, 0, shift, 0))
        new = new + keep * before
        keep = keep * nn.functional.pad(keep[:, :-shift], (0, 0, shift, 0))
        shift *= 2
    return new


class OwnPart(nn.Module):
    """A router's part as it is."""

    def __init__(self, rows: int, hidden_size: int, **config: Any) -> None:
        super().__init__()
        self.part = RouterPart(RouterConfig(width=WIDTH, hidden=HIDDEN, **config), 0, rows, hidden_size)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return self.part(self.part.features(self.part.read(x), real, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="prepared data; default: the cache's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--memories", nargs="+", default=list(MEMORIES), choices=list(MEMORIES))
    parser.add_argument("--texts", type=int, default=3, help="times 3,000, 2,000 and 2,000 of a kind to learn from")
    parser.add_argument("--steps", type=int, default=None, help="fewer steps than the one epoch")
    parser.add_argument("--out", type=Path, default=Path("runs/router-memory.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.float32)
    embedding = base.requires_grad_(False).get_input_embeddings().to(device)
    folder = options.data or data_dir()
    train = [row for rows in texts(folder, "train", tokenizer, options.texts).values() for row in rows]
    held_out = {split: texts(folder, split, tokenizer) for split in ("validation", "test")}
    found = []
    for name in options.memories:
        for seed in options.seeds:
            found.append(measure(name, seed, embedding, train, held_out, options.steps))
            print(json.dumps(found[-1]), flush=True)
    command = f"python -m benchmarks.router_memory --texts {options.texts}"
    command += f" --steps {options.steps}" if options.steps else ""
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in held_out["test"].items())
    about = f"test split by sha256 of the task or document id: {counts}; trained on {len(train)} texts, one epoch"
    write_report({**heading(command, about), "seeds": options.seeds, "rows": found}, options.out)


def texts(folder: Path, split: Any, tokenizer: Any, times: int = 1) -> dict[str, list[Encoded]]:
    examples = {name: read_examples(folder / f"{name}.{split}.jsonl") for name in DOMAINS}
    return {
        name: encode_within(way(examples, split, count * times if split == "train" else TEST), tokenizer, 1024, DOMAINS)
        for name, (way, count) in WAYS.items()
    }


def measure(
    name: str,
    seed: int,
    embedding: Any,
    train: Sequence[Encoded],
    held_out: dict[str, dict[str, list[Encoded]]],
    most: int | None,
) -> dict[str, Any]:
    """Trains one router and returns its figures."""
    torch.manual_seed(seed)
    device, size = embedding.weight.device, embedding.embedding_dim
    settings = dict(MEMORIES[name])
    layers, gated, units = (settings.pop(of, default) for of, default in (("layers", 1), ("gated", 0), ("gru", 0)))
    model: Any
    if gated:
        model = GatedPart(gated, layers, len(DOMAINS), size)
    else:
        model = GruPart(units, len(DOMAINS), size) if units else OwnPart(len(DOMAINS), size, **settings)
    model.to(device).train()
    model.part.mean.copy_(embedding.weight.mean(0))
    model.part.std.copy_(embedding.weight.std(0))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
    steps = plan_steps([row.input_ids.numel() for row in train], TOKENS, 1, seed)[:most]
    started = time.monotonic()
    for number, indices in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(number, len(steps), 0.05, RATE)
        batch = collate([train[index] for index in indices], 0).to(device)
        real = batch.attention_mask.bool()
        logits = model(embedding(batch.input_ids), real)
        loss = nn.functional.cross_entropy(logits[real], batch.domain_ids[real])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    seconds = time.monotonic() - started
    model.eval()
    right = {
        split: {of: accuracy(model, embedding, rows) for of, rows in texts.items()} for split, texts in held_out.items()
    }
    kept = units or gated * layers or model.part.new_memory(1, None).state.numel()
    return {
        "memory": name, "seed": seed, "validation": right["validation"], "right": right["test"],
        "parameters": sum(p.numel() for p in parameters),
        "state": kept, "seconds": round(seconds, 1),
    }  # fmt: skip


@torch.no_grad()
def accuracy(model: Any, embedding: Any, rows: Sequence[Encoded]) -> float:
    """Share of answer tokens that go to their own domain."""
    right = count = 0
    for indices in plan_pass([row.input_ids.numel() for row in rows], TOKENS):
        batch = collate([rows[index] for index in indices], 0).to(embedding.weight.device)
        chosen = model(embedding(batch.input_ids), batch.attention_mask.bool()).argmax(-1)
        answers = batch.labels != IGNORED
        right += int((chosen == batch.domain_ids)[answers].sum())
        count += int(answers.sum())
    return right / count


if __name__ == "__main__":
    main()
