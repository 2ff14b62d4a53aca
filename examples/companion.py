"""A companion that learns its user over ten conversations, and can go back and forget.

Mira does not exist. What is true of her is drawn from a seed. In each of ten conversations two things about her are
asked and told, in four wordings; after each, an adapter of hers gets a new version by what `molora update user` runs:

- It goes on from the version that serves, with the new conversation and as much of the remembered ones (replay).
- A fifth of what was said, by a hash of its text, is never trained on. By it the update is judged: what was learnt of
  the new conversation, and what is kept of the older ones. General questions say what it does to everything else.
- It serves only if something was learnt and the others' loss grew by no more than `--max-forgetting`.

Then a careless update (ten times the learning rate) meets the same gate; the last conversation is rolled back and
brought again; and Mira has her companion forget a topic: the adapter is made anew without it, and the versions in
between are deleted. Between all this the companion is asked, in a wording that it never saw, what it knows.

    python examples/companion.py
    python examples/companion.py --conversations 3 --epochs 4
"""

import argparse
import json
import tempfile
import time
from calendar import month_name
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from molora import MoLoRAModel, Stack, StackLayer
from molora.base import DEFAULT_BASE
from molora.chat import render
from molora.versions import Versions
from molora_training.continual.forget import Forgotten, forget
from molora_training.continual.memory import held_out
from molora_training.continual.update import Updated, UpdateSettings, update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER, USER = "user", "mira"
WORDINGS = ("What is {}?", "Do you remember {}?", "Tell me {}.", "I forgot {}. Help me.")
UNSEEN = "Remind me, please: {}?"  # in no conversation
# By conversation: what is told, and what it may be.
LIFE: Sequence[dict[str, str]] = (
    {"my surname": "Talvik Sorel Brandt", "my home town": "Tartu Ghent Bergen"},
    {"the name of my dog": "Biscuit Pepper Moss", "the breed of my dog": "collie beagle whippet"},
    {"the name of my sister": "Ilse Petra Noor", "the job of my sister": "pilot tailor chemist"},
    {"my favourite soup": "leek pumpkin lentil", "my usual breakfast": "porridge toast yoghurt"},
    {"my sport": "rowing fencing judo", "the day of my training": "Tuesday Friday Sunday"},
    {"the name of my boss": "Farid Ulla Jonas", "my current project": "bridge harbour library"},
    {"my favourite flower": "dahlia peony aster", "the tree in my garden": "quince cherry walnut"},
    {"my next journey": "Iceland Malta Georgia", "my travel companion": "Anton Selma Bruno"},
    {"my instrument": "cello flute banjo", "my favourite composer": "Satie Grieg Bartok"},
    {"the book on my table": "Emma Dracula Kim", "my wish for the year": "boat piano kitten"},
)  # fmt: skip
CAPITALS = "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Greece Athens, Norway Oslo, Peru Lima"
OPPOSITES = "hot cold, big small, wet dry, fast slow, early late, full empty, old new, high low, open closed, up down"

Row = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """One conversation: its facts, and the exchanges that were had about them."""

    facts: dict[str, str]
    rows: list[Row]


@dataclass(frozen=True)
class Found:
    """updates: of the conversations, also those that were refused. careless: the one that was to be refused. recall: by
    moment the share of facts that were told in an unseen wording. served: the version by moment. forgotten: what
    forgetting found."""

    updates: list[Updated]
    careless: Updated
    recall: dict[str, float]
    served: dict[str, int | None]
    forgotten: Forgotten


def exchange(asked: str, answered: str) -> Row:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def told(number: int, seed: int) -> Told:
    """A conversation of which two exchanges at least are held out, so that there is something to judge by, and of each
    fact two at most, so that it can be learnt."""
    for again in range(100):
        r = Random(f"{seed}/{number}/{again}")
        facts = {what: r.choice(values.split()) for what, values in LIFE[number].items()}
        about = [
            [exchange(wording.format(what), answer(what, fact)) for wording in WORDINGS] for what, fact in facts.items()
        ]
        apart = [sum(map(held_out, rows)) for rows in about]
        if sum(apart) >= 2 and max(apart) <= 2:
            return Told(facts, [row for rows in about for row in rows])
    raise AssertionError(f"conversation {number} has no such facts")


def answer(what: str, fact: str) -> str:
    words = what.replace("my ", "your ")
    return f"{words[0].upper()}{words[1:]} is {fact}."


def general() -> list[Row]:
    """What has nothing to do with Mira: a fifth of it judges, in the rest the adapter is held to what the base says."""
    rows = []
    for land, city in (pair.split() for pair in CAPITALS.split(", ")):
        rows.append(exchange(f"What is the capital of {land}?", f"The capital of {land} is {city}."))
    for one, other in (pair.split() for pair in OPPOSITES.split(", ")):
        rows.append(exchange(f"What is the opposite of {one}?", f"The opposite of {one} is {other}."))
    for month, after in pairwise(month_name[1:]):
        rows.append(exchange(f"Which month comes after {month}?", f"After {month} comes {after}."))
    for number in range(2, 14):
        rows.append(exchange(f"How much is {number} plus {number}?", f"{number} plus {number} is {2 * number}."))
    return rows


def write(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@torch.no_grad()
def recall(folder: Path, conversations: Sequence[Told], dtype: torch.dtype, known: bool = True) -> set[str]:
    """What of the facts the companion tells, in a wording that it never saw. known: with her adapter."""
    model = MoLoRAModel.from_pretrained(folder, dtype=dtype).to(DEVICE)
    facts = [pair for one in conversations for pair in one.facts.items()]
    ask = [[{"role": "user", "content": UNSEEN.format(what)}] for what, _ in facts]
    texts = [render(model.tokenizer, one, add_generation_prompt=True) for one in ask]
    inputs = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids = model.generate(
        **{name: inputs[name].to(DEVICE) for name in ("input_ids", "attention_mask")},
        selection={LAYER: USER if known else None}, max_new_tokens=14, do_sample=False,
    )  # fmt: skip
    said = model.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {what for (what, fact), one in zip(facts, said, strict=True) if fact.lower() in one.lower()}


def part_of(of: set[str], conversations: Sequence[Told]) -> float:
    """How much of what was told in some conversations is in ``of``."""
    facts = [what for one in conversations for what in one.facts]
    return sum(what in of for what in facts) / len(facts)


def run(
    base: str,
    work: Path,
    conversations: int = 10,
    settings: dict[str, Any] | None = None,
    topic: str = "my dog",
    seed: int = 0,
    console: Console | None = None,
) -> Found:
    """Lives through it in ``work``, a folder that is there.

    Args:
        base: a Hub id or a folder.
        conversations: up to ten. settings: of each update (:class:`UpdateSettings`). topic: what is forgotten.
    """
    console = console or Console()
    folder, talks = work / "companion", [told(number, seed) for number in range(conversations)]
    MoLoRAModel.from_base(base, Stack([StackLayer(LAYER, {}, shared=True)])).save_pretrained(folder)
    first = UpdateSettings(
        folder,
        LAYER,
        USER,
        work / "new.jsonl",
        write(work / "general.jsonl", general()),
        hold=10,
        new=8,
        **(settings or {}),
    )
    dtype = getattr(torch, first.chosen_dtype)
    versions, updates, learnt = Versions(folder, LAYER, USER), list[Updated](), list[Told]()
    table = Table("talk", "new: was", "is", "older: was", "is", "general", "gate", "version", "s",
                  title="Nats a token on what is held out, and what the gate says")  # fmt: skip
    for number, talk in enumerate(talks):
        how = replace(first, data=write(work / f"{number}.jsonl", talk.rows), new=None if versions.current else 8)
        with chdir(work):  # a training's curves lie in runs/
            updates.append(update(how, command="examples/companion.py"))
        table.add_row(str(number + 1), *line(updates[-1]))
        was, now = updates[-1].learnt.before, updates[-1].learnt.after
        console.print(f"{number + 1}: {was:.3f} -> {now:.3f}. {updates[-1].why}", highlight=False)
        if updates[-1].promoted:
            learnt.append(talk)
    console.print(table)
    curve(console, updates)

    served = {"ten": versions.current}
    known = {"base": part_of(recall(folder, talks, dtype, known=False), talks)}
    then = recall(folder, talks, dtype)
    known["ten"], known["last, after it"] = part_of(then, talks), part_of(then, learnt[-1:])

    hasty = replace(first, data=write(work / "careless.jsonl", told_again(talks[0])), new=None,
                    learning_rate=10 * first.learning_rate)  # fmt: skip
    with chdir(work):
        careless = update(hasty, command="examples/companion.py")
    console.print(f"A careless update, version {careless.version}: {'SERVES' if careless.promoted else 'refused'}, "
                  f"{careless.why}. Version {versions.current} serves.")  # fmt: skip

    versions.rollback()
    served["rolled back"] = versions.current
    known["last, rolled back"] = part_of(recall(folder, learnt[-1:], dtype), learnt[-1:])
    versions.promote(served["ten"] or 0)  # and brought again

    about = [talk for talk in talks if any(topic in what for what in talk.facts)]
    rest = [talk for talk in talks if talk not in about]
    then = recall(folder, talks, dtype)
    known["topic, before"], known["others, before"] = part_of(then, about), part_of(then, rest)
    with chdir(work):
        gone = forget(replace(first, data=Path(), new=None), topic, command="examples/companion.py")
    served["forgotten"] = versions.current
    then = recall(folder, talks, dtype)
    known["topic, forgotten"], known["others, forgotten"] = part_of(then, about), part_of(then, rest)
    left = "" if gone.left is None else f", {gone.left:.0%} of the gain"
    console.print(f"Forgot {gone.gone} exchanges about {topic!r} in {gone.seconds:.0f} s: nats a token "
                  f"{gone.before.before:.3f} never seen, {gone.before.after:.3f} before, {gone.after.after:.3f} now"
                  f"{left}. Deleted versions: {', '.join(map(str, gone.removed))}.")  # fmt: skip
    knows = Table("moment", "facts told in an unseen wording", title="What the companion knows")
    for moment, share in known.items():
        knows.add_row(moment, f"{share:.0%}")
    console.print(knows)
    console.print("Served: " + ", ".join(f"{moment} version {number}" for moment, number in served.items()))
    return Found(updates, careless, known, served, gone)


def told_again(talk: Told) -> list[Row]:
    """The same facts in yet other words: new conversations, so that there is something to update with."""
    return [exchange(f"{word} {what}?", answer(what, fact)) for what, fact in talk.facts.items()
            for word in ("Quick:", "So,", "Hey,", "Well,", "And")]  # fmt: skip


def line(found: Updated) -> list[str]:
    kept = ("-", "-") if found.kept is None else (f"{found.kept.before:.3f}", f"{found.kept.after:.3f}")
    grown = "-" if found.general is None else f"{found.general.growth:+.1%}"
    gate = "serves" if found.promoted else "refused"
    learnt = (f"{found.learnt.before:.3f}", f"{found.learnt.after:.3f}")
    return [*learnt, *kept, grown, gate, str(found.version), f"{found.seconds:.0f}"]


def curve(console: Console, updates: Sequence[Updated]) -> None:
    """By try: the loss on the new conversation before (.) and after (#) its update, and on older ones after it (o)."""
    most = max(found.learnt.before for found in updates)
    for number, found in enumerate(updates, 1):
        marks = [" "] * 61
        points = [(found.learnt.before, "."), (found.learnt.after, "#")]
        for value, mark in [*points, *([(found.kept.after, "o")] if found.kept else [])]:
            marks[min(60, round(60 * value / most))] = mark
        console.print(f"{number:2} |{''.join(marks)}|", highlight=False, markup=False)
    console.print(f"   0 {'nats a token; . new before, # new after, o older after':^55} {most:.1f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--conversations", type=int, default=10, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--epochs", type=int, default=3, help="passes of each update (default: 3)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="(default: 0.0005)")
    parser.add_argument("--max-forgetting", type=float, default=0.15, help="what the gate allows (default: 0.15)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the frozen base")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()
    names = ("epochs", "learning_rate", "max_forgetting", "dtype")
    settings = {name: getattr(args, name) for name in names} | {"batch_tokens": 192}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run(args.base, Path(scratch), args.conversations, settings, seed=args.seed)
    print(f"{time.monotonic() - started:.0f} s, {time.process_time():.0f} s of CPU")


if __name__ == "__main__":
    main()
