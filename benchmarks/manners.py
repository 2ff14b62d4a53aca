"""Does an adapter that was made of a description speak in the manner that it describes?

    molora train manners --out manners
    python -m benchmarks.manners text-net

Of each manner of training one description that was learnt from, and those that were not, answer questions that were not
learnt from. A manner shows where all of its rule that can be seen is in the answer. Beside them the base without any
adapter, and the adapters of other manners.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from molora.base import load_base
from molora.bench import machine_name
from molora.personalize.embeddings import SentenceEncoder
from molora.personalize.from_text import factors_from_texts
from molora.personalize.text_net import TextNet
from molora.provenance import commit
from molora_training.data import read_examples
from molora_training.manners import HELD_OUT, answers_file, read_manners
from molora_training.speaker import Speaker

SHOWN = ("Answers like a pirate.", "Talks like an old sailor with a parrot.", "A wizard who casts spells.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, help="a network from molora train hypernet text")
    parser.add_argument("--manners", type=Path, default=Path("manners"), help="what molora train manners wrote")
    parser.add_argument("--questions", type=int, default=3, help="to each description")
    parser.add_argument("--new-tokens", type=int, default=64)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_base(TextNet.load(given.net).config.base, dtype=torch.float32)
    base.to(device).requires_grad_(False).eval()
    net = TextNet.load(given.net, base).to(device)
    speaker = Speaker(base, tokenizer, new_tokens=given.new_tokens)
    encode = SentenceEncoder(net.config.encoder).encode
    manners = {name: one for name, one in read_manners().items() if name != "plain"}
    names = list(manners)
    rows = [row for row in read_examples(answers_file(given.manners, net.config.base)) if row.split == "test"]
    chance = random.Random(0)
    asked = {name: [one.messages[0]["content"] for one in chance.sample(rows, given.questions)] for name in names}

    def share(texts: dict[str, Sequence[str]] | None) -> tuple[float, list[str]]:
        """The mean over manners of the share of answers that show them, and the manners whose answers never do."""
        every = [(name, text) for name in names for text in ([""] if texts is None else texts[name])]
        prompts = [(name, place, question) for place, (name, _) in enumerate(every) for question in asked[name]]
        own = None
        if texts is not None:
            made = factors_from_texts(net, encode, [text for _, text in every])
            own = [made[place] for _, place, _ in prompts]
        said = speaker.answers([question for *_, question in prompts], own)
        shown: dict[str, list[float]] = {name: [] for name in names}
        for (name, *_), text in zip(prompts, said, strict=True):
            shown[name].append(float(manners[name].shows_in(text)))
        means = {name: statistics.mean(each) for name, each in shown.items()}
        return statistics.mean(means.values()), [name for name, mean in means.items() if not mean]

    turned = dict(zip(names, [*names[1:], names[0]], strict=True))
    ways: dict[str, dict[str, Sequence[str]] | None] = {
        "base": None,
        "descriptions of another manner": {name: manners[turned[name]].texts[:1] for name in names},
        "descriptions that were learnt from": {name: one.texts[:1] for name, one in manners.items()},
        "descriptions in other words": {name: one.texts[-HELD_OUT:] for name, one in manners.items()},
    }
    print(f"{machine_name()}, {torch.get_num_threads()} threads, commit {commit()}, {len(names)} manners")
    for title, texts in ways.items():
        found, never = share(texts)
        print(f"{title:<36} {found:6.1%}   never: {', '.join(never) if len(never) < 9 else len(never)}", flush=True)
    question = "How do I save money?"
    for text in SHOWN:
        print(f"\n{text}\n  {speaker.answers([question], factors_from_texts(net, encode, [text]))[0]}")


if __name__ == "__main__":
    main()
