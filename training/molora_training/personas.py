"""Training data for a manner of speaking: the base answers under a system prompt, the answers are kept without it.

An adapter trained on them speaks so without the prompt (sequence-level context distillation, arXiv 2209.15189).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from molora.base import DEFAULT_BASE, load_base
from molora.chat import render
from molora.errors import DataError
from molora_training.data import Example, data_dir, write_examples
from molora_training.data.items import SPLITS, split_of
from molora_training.data.read_general import read_questions
from molora_training.settings import from_mapping

CONFIG = Path(__file__).parent / "configs" / "personas.yaml"
_NEW_TOKENS = 96


@dataclass(frozen=True)
class Persona:
    """A manner of speaking: how it is shown to the base, and by what an answer is known to have it."""

    system: str | None
    exchanges: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...]

    def prompt(self, question: str) -> list[dict[str, str]]:
        """The messages under which the base answers."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.exchanges:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]

    def shows_in(self, answer: str) -> bool:
        """Whether an answer has the manner."""
        return all(re.search(mark, answer) for mark in self.marks)


def read_personas(file: Path = CONFIG) -> dict[str, Persona]:
    """The personas of a YAML file. Raises ConfigError for an unknown or missing key."""
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: from_mapping(Persona, entry, f"{name}.") for name, entry in data.items()}


def prepare(
    out: Path | None = None, names: Sequence[str] = (), base: str = DEFAULT_BASE, tries: int = 4, seed: int = 0
) -> dict[str, dict[str, int]]:
    """Writes ``<persona>.<split>.jsonl``: one kept answer to each everyday question.

    Args:
        out: the folder; None means that of the other data.
        names: which personas; all if none are named.
        base: the model that answers.
        tries: answers sampled for each question, of which the best is kept (see :func:`best_answer`).
        seed: of the sampling.

    Returns:
        Number of examples by persona and split.
    """
    from tqdm.auto import tqdm

    personas = read_personas()
    unknown = [name for name in names if name not in personas]
    if unknown:
        raise DataError(f"There is no persona {unknown[0]!r}; there are {', '.join(personas)}.")
    folder = out or data_dir()
    questions = read_questions(folder)
    batch = (1024 if torch.cuda.is_available() else 64) // tries
    counts: dict[str, dict[str, int]] = {}
    model, tokenizer = load_base(base, device_map="cuda" if torch.cuda.is_available() else None)
    for name in names or personas:
        persona = personas[name]
        found: list[Example] = []
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(questions), batch), desc=f"answers of {name}"):
            some = questions[start : start + batch]
            answers = answer(model, tokenizer, [persona.prompt(q) for _, q in some], tries)
            for (id_, question), candidates in zip(some, answers, strict=True):
                best = best_answer(persona, candidates)
                if best is not None:
                    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": best})
                    found.append(Example(f"{name}-{id_}", name, split_of(id_), turns))
        counts[name] = {}
        for split in SPLITS:
            rows = [example for example in found if example.split == split]
            write_examples(folder / f"{name}.{split}.jsonl", rows)
            counts[name][split] = len(rows)
    return counts


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], tries: int, new_tokens: int = _NEW_TOKENS
) -> list[list[str]]:
    """``tries`` sampled answers to each prompt."""
    tokenizer.padding_side = "left"
    texts = [render(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    ids = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=tries
    )
    said = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return [said[i * tries : (i + 1) * tries] for i in range(len(prompts))]


def best_answer(persona: Persona, candidates: Sequence[str]) -> str | None:
    """The candidate that ended by itself, shows the manner and repeats itself least; None if none does."""
    whole = [text.split("<|im_end|>")[0].strip() for text in candidates if "<|im_end|>" in text]
    fitting = [text for text in whole if len(text.split()) >= 8 and persona.shows_in(text) and _variety(text) > 0.75]
    return max(fitting, key=_variety, default=None)


def _variety(text: str) -> float:
    """Share of different ones among the pairs of neighbouring words."""
    words = re.findall(r"\w+", text.lower())
    pairs = list(pairwise(words))
    return len(set(pairs)) / max(1, len(pairs))
