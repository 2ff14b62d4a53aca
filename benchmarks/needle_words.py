"""Does a document's adapter find a number that is written, or asked for, in other words than those of the training?

    python -m benchmarks.needle_words starter/hypernets/document

The needles of `molora eval documents`, 256 tokens of made-up filler each, with the sentence that holds the number and
the question for it reworded. Printed is how many answers hold the number, with the needle's own adapter.
"""

import argparse
from pathlib import Path

import torch

from molora.base import load_base
from molora.bench import machine_name
from molora.personalize.document_net import DocumentNet
from molora.personalize.internalize import factors_of
from molora.provenance import commit
from molora_training.document_table import numbers
from molora_training.hypernet.lessons import Needles
from molora_training.speaker import Speaker

TOKENS = 256
_SENTENCE, _QUESTION = "The magic number for {name} is {number}.", "What is the magic number for {name}?"
WAYS = {
    "as in the training": (_SENTENCE, _QUESTION),
    "another question": (_SENTENCE, "Which number belongs to {name}?"),
    "another thing": ("The lamp number of {name} is {number}.", "What is the lamp number of {name}?"),
    "another sentence": ("Invoice {number} was sent to {name}.", "Which invoice was sent to {name}?"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", type=Path, help="a network from molora train hypernet doc")
    parser.add_argument("--needles", type=int, default=16, help="of each way")
    given = parser.parse_args()
    net = DocumentNet.load(given.net)
    base, tokenizer = load_base(net.config.base, dtype=torch.float32)
    base.requires_grad_(False).eval()
    speaker = Speaker(base, tokenizer)
    print(f"{machine_name()}, {torch.get_num_threads()} threads, commit {commit()}")
    for way, (sentence, question) in WAYS.items():
        asked, texts, wanted = [], [], []
        for lesson in Needles((TOKENS, TOKENS), seed=1, count=given.needles).of_length(TOKENS):
            (prompt, answer), *_ = lesson.questions
            name = prompt.removeprefix("What is the magic number for ").removesuffix("?")
            number = answer.split()[-1].removesuffix(".")
            written = _SENTENCE.format(name=name, number=number)
            if written not in lesson.text:
                raise AssertionError(f"The needles are written otherwise now: {lesson.text!r}")
            texts.append(lesson.text.replace(written, sentence.format(name=name, number=number)))
            asked.append(question.format(name=name))
            wanted.append(number)
        said = speaker.answers(asked, [factors_of(base, tokenizer, net, text) for text in texts])
        found = sum(number in numbers(text) for number, text in zip(wanted, said, strict=True))
        print(f"{way:<20} {found} of {len(said)}, such as {wanted[0]}: {said[0]!r}", flush=True)


if __name__ == "__main__":
    main()
