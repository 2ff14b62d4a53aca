"""Bring your own adapters: a folder of PEFT adapters becomes one model that uses the right one at each token.

You have LoRA adapters, in the form in which PEFT saves them. Perhaps somebody gave you some, perhaps you trained one
last week. This script goes the whole way:

1. A folder is filled: two adapters of the starter stack (mathematics, Python) are copied as they lie on disk, and a
   third one, which writes a ship's logbook, is trained here by `peft` alone. MoLoRA has no part in that.
2. `stack.yaml` names the folder. Nothing is converted.
3. One adapter by name gives the logits that PEFT gives. That is checked, not assumed.
4. A router is trained on a few hundred short texts. It reads embeddings only, so no layer of the base is run.
5. Texts that change their subject twice are read with no adapter, with each alone, and routed.
6. What was saved is loaded again, and answers with the same logits.

    python examples/bring_your_own_adapters.py
    python examples/bring_your_own_adapters.py --steps 80 --keep my-molora
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from molora import MoLoRAModel, RouterConfig
from molora.base import DEFAULT_BASE, load_base
from molora.chat import render
from molora.starter import starter_folder
from molora_training import router
from molora_training.data import Example, MixedExample, collate, encode_within, write_examples
from molora_training.evaluate import losses
from molora_training.router_settings import RouterTrainSettings

MARGIN = 400  # tokens: no text here is longer
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sum_of(r: Random) -> tuple[str, str]:
    """Mathematics: a problem and its solution, worked out as in the data that the starter's adapter has seen."""
    name, thing = r.choice(["Mia", "Omar", "Lena", "Ivan"]), r.choice(["pens", "apples", "stamps", "coins"])
    a, b, c = r.randrange(3, 20), r.randrange(2, 9), r.randrange(2, 9)
    asked = f"{name} has {a} {thing} and buys {b} bags with {c} {thing} each. How many {thing} does {name} have now?"
    return asked, f"The bags hold {b} * {c} = {b * c} {thing}. So {name} has {a} + {b * c} = {a + b * c} {thing} now."


def function(r: Random) -> tuple[str, str]:
    """Code: a small Python function."""
    name, what = r.choice([("total", "sum(values)"), ("largest", "max(values)"), ("count", "len(values)")])
    n, sign = r.randrange(2, 30), r.choice("+-*")
    asked = f"Write a Python function {name}_{n} that takes a list and returns its {name} {sign} {n}."
    return asked, f"def {name}_{n}(values):\n    return {what} {sign} {n}"


def log(r: Random) -> tuple[str, str]:
    """The logbook: a form of its own, which no base model can guess."""
    ship, day, wind = r.choice(["Heron", "Petrel", "Gannet"]), r.randrange(1, 90), r.choice(["NW", "SE", "W", "S"])
    force, miles, course = r.randrange(2, 9), r.randrange(40, 190), r.randrange(10, 350)
    asked = f"Log of the {ship}, day {day}: wind {wind} {force}, course {course}, {miles} miles."
    return asked, f"~{ship.upper()}~ d{day:03} / {wind}{force} / c{course:03} / {miles}nm / all well, lamps lit ~"


TOPICS: Mapping[str, Callable[[Random], tuple[str, str]]] = {"math": sum_of, "code": function, "log": log}


@dataclass(frozen=True)
class Found:
    """What came out: nats an answer token by contender and topic, the worst difference from PEFT's logits relative to
    the largest logit, the share of the tokens of mixed texts that go to their own topic's adapter."""

    losses: dict[str, dict[str, float]]
    peft: float
    right: float
    reloaded: bool


def turns(topic: str, r: Random) -> tuple[dict[str, str], ...]:
    asked, answered = TOPICS[topic](r)
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def train_by_peft(base: str, topic: str, out: Path, steps: int, rows: int = 4) -> None:
    """One adapter, as anybody trains one: a `LoraConfig`, AdamW, the loss on the answers, `save_pretrained`."""
    plain, tokenizer = load_base(base, dtype=torch.float32, progress=False)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain.to(DEVICE), config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    r = Random(f"train/{topic}")
    for _ in range(steps):
        examples = [Example("", topic, "train", turns(topic, r)) for _ in range(rows)]
        batch = collate(encode_within(examples, tokenizer, MARGIN, [topic]), tokenizer.pad_token_id).to(DEVICE)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(out, save_embedding_layers=False)


@torch.no_grad()
def beside_peft(base: str, folder: Path, model: MoLoRAModel, name: str) -> float:
    """The largest difference between our logits and PEFT's, as a share of the largest logit."""
    plain, tokenizer = load_base(base, dtype=torch.float32, progress=False)
    peft = PeftModel.from_pretrained(plain.to(DEVICE), folder).eval()
    text = render(tokenizer, turns(name, Random("peft")))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(DEVICE)
    wanted, ours = peft(ids).logits, model(ids, selection={"domain": name}).logits
    return float((wanted - ours).abs().max() / wanted.abs().max())


def write_texts(folder: Path, topics: list[str], count: int) -> None:
    """What the router learns from: the adapters' own kind of text, one file each, named like the adapter."""
    for topic in topics:
        for split, many in (("train", count), ("validation", max(8, count // 10))):
            r = Random(f"{split}/{topic}")
            rows = [Example(f"{split}-{n}", topic, split, turns(topic, r)) for n in range(many)]
            write_examples(folder / f"{topic}.{split}.jsonl", rows)


def show_routes(console: Console, model: MoLoRAModel, text: MixedExample) -> None:
    """The text in runs of tokens that went to one adapter."""
    inputs = model.encode(render(model.tokenizer, text.messages))
    with torch.no_grad():
        routes = model(**inputs, output_routes=True, logits_to_keep=1).routes
    table = Table("adapter", "tokens", "text", title="One text, and who acted on its tokens")
    chosen = [routes.at(0, place)[0][1] for place in range(inputs["input_ids"].shape[1])]
    place = 0
    for name, run in groupby(chosen):
        many = len(list(run))
        said = model.tokenizer.decode(inputs["input_ids"][0, place : place + many])
        table.add_row(name or "none", str(many), said.replace("\n", "⏎"))
        place += many
    console.print(table)


def run(
    base: str,
    work: Path,
    given: Mapping[str, Path],
    steps: int = 40,
    texts: int = 120,
    mixed: int = 300,
    judged: int = 10,
    epochs: int = 2,
    console: Console | None = None,
) -> Found:
    """Goes the whole way in ``work``.

    Args:
        base: a Hub id or a folder.
        given: PEFT folders that are there already; the other topics' adapters are trained.
        steps: of each training by PEFT.
        texts, mixed: of each topic for the router, and mixed ones; epochs: passes over so many.
        judged: texts that change their subject, on which all are compared.
    """
    console = console or Console()
    folder, names = work / "mine", list(TOPICS)
    for name in names:
        if name in given:
            shutil.copytree(given[name], folder / name)
        else:
            console.print(f"peft trains {name}: {steps} steps")
            train_by_peft(base, name, folder / name, steps)

    (work / "stack.yaml").write_text("layers:\n  - name: domain\n    adapters: mine\n", encoding="utf-8")
    by_name = MoLoRAModel.from_base(base, work / "stack.yaml", dtype=torch.float32).to(DEVICE)
    peft = max(beside_peft(base, folder / name, by_name, name) for name in names)
    console.print(f"logits with one adapter by name, beside PEFT's: they differ by {peft:.1e} of the largest at most")
    del by_name

    write_texts(work / "texts", names, texts)
    settings = RouterTrainSettings(
        work / "stack.yaml", work / "molora", work / "texts", base, router=RouterConfig(), mixed=mixed, documents=0,
        in_a_turn=0, asides=0, epochs=epochs, batch_tokens=4096, max_length=MARGIN * len(names), dtype="float32",
    )  # fmt: skip
    with chdir(work):  # curves and checkpoints of trainings lie in runs/
        metrics = router.train(settings, resume=False)
    console.print(f"router: {metrics['parameters']:,} parameters, {metrics['seconds']} s")

    model = MoLoRAModel.from_pretrained(work / "molora", dtype=torch.float32).to(DEVICE)
    r = Random("judged")
    orders = [r.sample(names, len(names)) for _ in range(judged)]
    mixes = [
        MixedExample(f"{n}", "test", tuple(turn for topic in order for turn in turns(topic, r)), tuple(order))
        for n, order in enumerate(orders)
    ]
    rows = encode_within(mixes, model.tokenizer, MARGIN * len(names), names)
    choices: dict[str, Any] = {"base": None, **{f"{name} alone": name for name in names}, "routed": "auto"}
    found: dict[str, dict[str, float]] = {}
    table = Table("", *names, "all", title=f"Nats an answer token, {judged} texts that change their subject twice")
    for label, choice in choices.items():
        own = losses(model, rows, {"domain": choice}, len(names))
        each = (own.loss.sum(0) / own.tokens.sum(0)).tolist()
        found[label] = {**dict(zip(names, each, strict=True)), "all": own.mean}
        table.add_row(label, *(f"{value:.3f}" for value in found[label].values()))
    console.print(table)
    for name in names:  # an adapter is good for what it was trained on; a form that is new to it may be another matter
        if found[f"{name} alone"][name] > found["base"][name]:
            console.print(f"{name} makes its own topic worse here than the base is: no router can mend that")
    right = share_right(model, rows, names)
    console.print(f"{right:.1%} of all tokens, questions and answers, went to their own topic's adapter")
    show_routes(console, model, mixes[0])

    model.save_pretrained(work / "again")
    again = MoLoRAModel.from_pretrained(work / "again", dtype=torch.float32).to(DEVICE)
    ids = rows[0].input_ids[None].to(DEVICE)
    with torch.no_grad():
        reloaded = torch.equal(model(ids).logits, again(ids).logits)
    console.print(f"saved and loaded again: the routed logits are {'the same, bit for bit' if reloaded else 'OTHERS'}")
    return Found(found, peft, right, reloaded)


@torch.no_grad()
def share_right(model: MoLoRAModel, rows: list[Any], names: list[str]) -> float:
    """By the routes of a forward, which say a slot for each token."""
    right = count = 0
    for row in rows:
        routes = model(row.input_ids[None].to(DEVICE), output_routes=True, logits_to_keep=1).routes
        own = torch.tensor([routes.names.index(f"domain/{name}") for name in names])[row.domain_ids]
        right += int((routes.slots[0, :, 0].cpu() == own).sum())
        count += len(own)
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE, help="the base; the starter's adapters fit the default alone")
    parser.add_argument("--steps", type=int, default=40, help="of each adapter that peft trains (default: 40)")
    parser.add_argument("--texts", type=int, default=120, help="of each topic for the router (default: 120)")
    parser.add_argument("--keep", type=Path, help="a folder, not there yet, for the saved MoLoRA")
    args = parser.parse_args()
    logging.disable_progress_bar()
    given = {}
    if args.base == DEFAULT_BASE:
        given = {name: starter_folder() / "adapters" / "domain" / name for name in ("math", "code")}
    with tempfile.TemporaryDirectory() as scratch:
        run(args.base, Path(scratch), given, args.steps, args.texts)
        if args.keep is not None:
            shutil.copytree(Path(scratch) / "again", args.keep)


if __name__ == "__main__":
    main()
