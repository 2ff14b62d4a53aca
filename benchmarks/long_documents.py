"""What does the adapter of a long document know of one of the passages that it is put together from?

    molora train data passages
    python -m benchmarks.long_documents starter/hypernets/document

Nats of an answer's token, of questions that are answered in words, about passages of the validation split: with the
adapter of the document that the passage is in, with another document's, and with none. Once as adapters are made, and
once with all that chunks have in common added up, as often as there are chunks (together: 0 in hypernet.json).
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from molora.base import load_base
from molora.bench import machine_name
from molora.factors import Factors
from molora.personalize.document_net import DocumentNet
from molora.personalize.internalize import factors_of
from molora.provenance import commit
from molora_training.data import Example, data_dir, encode_within
from molora_training.data.lessons import of_kind, read_lessons
from molora_training.speaker import Speaker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, help="a network from molora train hypernet doc")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--passages", type=int, default=8, help="of a document")
    given = parser.parse_args()
    net = DocumentNet.load(given.net)
    base, tokenizer = load_base(net.config.base, dtype=torch.float32)
    base.requires_grad_(False).eval()
    speaker = Speaker(base, tokenizer)
    every = of_kind(read_lessons(data_dir() / "passages.validation.jsonl"), "words")
    parts = [every[start : start + given.passages] for start in range(0, len(every), given.passages)][: given.documents]
    texts = ["\n".join(lesson.text for lesson in part) for part in parts]
    asked = [(place, *lesson.questions[0]) for place, part in enumerate(parts) for lesson in part]
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for _, q, a in asked]
    rows = encode_within(
        [Example(str(n), "passages", "validation", one) for n, one in enumerate(turns)],
        tokenizer,
        1 << 30,
        ["passages"],
    )

    def nats(own: Sequence[Factors] | None, turned: int = 0) -> float:
        each = None if own is None else [own[(place + turned) % len(own)] for place, *_ in asked]
        total, count = speaker.losses(rows, each).sum(0).tolist()
        return float(total / count)

    tokens = [len(tokenizer(text)["input_ids"]) for text in texts]
    print(f"{machine_name()}, {torch.get_num_threads()} threads, commit {commit()}")
    print(f"{len(texts)} documents of {min(tokens)} to {max(tokens)} tokens, {len(rows)} questions; nats a token")
    print(f"{'no adapter':<28} {nats(None):.3f}")
    for title, together in (("as made", net.config.together), ("all added up", 0)):
        net.config = replace(net.config, together=together)
        own = [factors_of(base, tokenizer, net, text) for text in texts]
        print(f"{title:<28} {nats(own):.3f}, of another document {nats(own, 1):.3f}", flush=True)


if __name__ == "__main__":
    main()
