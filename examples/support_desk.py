"""A support desk with an adapter for each of its 60 products, on one base, and a 61st that comes while it runs.

The products are made up from a seed: each has its own cause of error E1, its warranty, its filter and its reset button,
and all have the same questions, so that only the right adapter can know. No part of the answers is in the prompt.

- Training: all adapters are small and lie in the last layers. What enters those layers is computed once; then up to 20
  adapters learn side by side, each sequence of a batch under its own. What comes out are ordinary PEFT folders.
- Routing: a router that reads embeddings learns from the same questions, in seconds. For each token it says which of
  the 60 acts, in the one pass that the base makes anyway, over one ordinary KV cache.
- Judged by wordings that nothing was trained on: which adapter acts on the answer, and whether the answer is right;
  beside the base, beside all adapters merged into one, and beside the right adapter by name.
- A new product: its adapter and its row of the router, which is fitted to its twelve questions and trains nothing else.

    python examples/support_desk.py
    python examples/support_desk.py --products 20 --epochs 14
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.adapter import total_bytes
from molora.base import DEFAULT_BASE, load_base
from molora.chat import render
from molora.factors import Factors, write_factors
from molora_training import router
from molora_training.data import IGNORED, Encoded, Example, collate, encode_within, write_examples
from molora_training.router_settings import RouterTrainSettings
from molora_training.side_by_side import Schedule, module_names, train_adapters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER, MOST = "desk", 1024
# The router remembers by plain moving averages. Of so little text, in which the products differ by their names alone,
# they find 99.6% of held-out answers' tokens, and the default, a memory of learned gates, 76.6% after as many epochs.
DECAYS = (0.8, 0.95)
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CAUSES = (
    "blocked inlet,loose belt,weak battery,open lid,worn brush,cold sensor,wet contact,full tank,bent pin,dusty fan"
)
KINDS = (
    "kettle",
    "drill",
    "lamp",
    "heater",
    "scale",
    "printer",
    "mixer",
    "fan",
    "speaker",
    "camera",
    "pump",
    "toaster",
)
ASKED = {
    "error": ["What does error E1 mean on the {}?", "My {} shows E1. What is wrong?", "{}: error E1, what is it?"],
    "warranty": [
        "How long is the warranty of the {}?",
        "For how many months is my {} covered?",
        "{}: warranty period?",
    ],
    "filter": ["Which spare filter fits the {}?", "What is the filter number for my {}?", "{}: filter number?"],
    "reset": ["Which button resets the {}?", "How do I reset my {}?", "{}: reset button?"],
}
UNSEEN = {  # wordings, of which none is trained on
    "error": ["The display of our {} reads E1, why?", "Code E1 came up on a {}. Cause?"],
    "warranty": ["How many months does the guarantee on a {} run?", "I bought a {}. When does its warranty end?"],
    "filter": ["I need a new filter for our {}, which one?", "Tell me the filter that a {} takes."],
    "reset": ["Our {} hangs. What do I press to reset it?", "Tell me the reset button of a {}."],
}


@dataclass(frozen=True)
class Product:
    """One indicator of the desk. label: its adapter's name."""

    label: str
    name: str
    facts: Mapping[str, str]

    def examples(self, wordings: Mapping[str, Sequence[str]], split: Any = "train") -> list[Example]:
        return [
            Example(f"{split}-{what}-{n}", self.label, split, chat(asked.format(self.name), self.facts[what]))
            for what, several in wordings.items()
            for n, asked in enumerate(several)
        ]


@dataclass(frozen=True)
class Found:
    """right: share of answer tokens on which the right adapter acted. answers: by contender the share of right answers.
    passes, tokens: forwards of the base for so many generated tokens. Of the 61st: the share for itself, and for the
    others after it came."""

    right: float
    answers: dict[str, float]
    passes: int
    tokens: int
    new_right: float
    others_right: float
    new_answers: float


def chat(asked: str, fact: str) -> tuple[dict[str, str], ...]:
    said = {"role": "assistant", "content": f"{fact[0].upper()}{fact[1:]}."}
    return {"role": "user", "content": asked}, said


def make_products(count: int, seed: int) -> list[Product]:
    r, names, made = Random(seed), set[str](), []
    while len(names) < count:
        names.add(
            "".join(r.choice("bdfgklmnprstvz") + r.choice("aeiou") for _ in range(2)) + r.choice(["lo", "nix", "tek"])
        )
    for name in sorted(names):
        facts = {
            "error": f"a {r.choice(CAUSES.split(','))}",
            "warranty": f"{r.randrange(6, 61)} months",
            "filter": f"F-{r.randrange(100, 1000)}",
            "reset": f"the {r.choice(['red', 'blue', 'green', 'black', 'white', 'yellow', 'grey'])} button",
        }
        made.append(Product(name, f"{name.capitalize()} {r.choice(KINDS)}", facts))
    r.shuffle(made)
    return made


@torch.no_grad()
def upper_half(base: Any, first: int, rows: Sequence[Sequence[Encoded]]) -> tuple[Any, list[list[Encoded]]]:
    """A model of the layers from ``first`` on, whose "vocabulary" is what enters them at each token of ``rows``.

    The layers below stay as they are, so they need not run again in each epoch: the row of a token in the table of such
    states takes the place of its id. Labels are still the tokens themselves.
    """
    table, at, found = [torch.zeros(1, base.config.hidden_size, dtype=base.dtype, device=base.device)], 1, []
    for own in rows:
        batch = collate(own, 0).to(base.device)
        states = base.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True,
                            use_cache=False).hidden_states[first]  # fmt: skip
        found.append([])
        for row, state in zip(own, states, strict=True):
            length = len(row.input_ids)
            table.append(state[:length])
            found[-1].append(Encoded(torch.arange(at, at + length), row.labels, row.segments, row.domain_ids))
            at += length
    config = copy.deepcopy(base.config)
    config.num_hidden_layers -= first
    config.use_cache = False
    with torch.device("meta"):
        upper = type(base)(config)
    upper.model.layers, upper.model.norm = base.model.layers[first:], base.model.norm
    upper.model.rotary_emb, upper.lm_head = base.model.rotary_emb, base.lm_head
    upper.model.embed_tokens = nn.Embedding.from_pretrained(torch.cat(table))
    return upper.requires_grad_(False).eval(), found


def train(
    base: Any, tokenizer: Any, products: Sequence[Product], out: Path, how: Schedule, rank: int, last: int
) -> None:
    """An adapter for each product in the ``last`` layers, as PEFT folders; those that are there stay."""
    first = base.config.num_hidden_layers - last
    products = [one for one in products if not (out / one.label).is_dir()]
    if not products:
        return
    rows = [encode_within(one.examples(ASKED), tokenizer, MOST, [one.label]) for one in products]
    upper, rows = upper_half(base, first, rows)
    modules = module_names(upper, TARGETS)
    for start in range(0, len(products), 20):  # so many at once: what a step keeps for the way back grows with them
        some = slice(start, start + 20)
        for one, factors in zip(products[some], train_adapters(upper, rows[some], 0, how, modules, rank), strict=True):
            write_factors(out / one.label, moved(factors, first), DEFAULT_BASE)


def moved(factors: Factors, first: int) -> Factors:
    """The names that the modules have in the whole base."""
    parts = {name: name.split(".") for name in factors}
    return {".".join([*p[:2], str(int(p[2]) + first), *p[3:]]): factors[name] for name, p in parts.items()}


def train_router(base: str, products: Sequence[Product], work: Path, mixed: int, epochs: int) -> None:
    """A saved MoLoRA in work/desk. Labels alone are learnt, and embeddings read: no layer of the base runs."""
    for one in products:
        write_examples(work / "texts" / f"{one.label}.train.jsonl", one.examples(ASKED))
        write_examples(work / "texts" / f"{one.label}.validation.jsonl", one.examples(ASKED, "validation")[:2])
    Stack([StackLayer(LAYER, {one.label: work / "adapters" / one.label for one in products})]).save(work / "stack.yaml")
    settings = RouterTrainSettings(
        work / "stack.yaml", work / "desk", work / "texts", base, router=RouterConfig(decays=DECAYS), mixed=mixed,
        documents=0, in_a_turn=0, asides=0, epochs=epochs, batch_tokens=2048, learning_rate=3e-3,
    )  # fmt: skip
    with chdir(work):  # curves lie in runs/
        router.train(settings, resume=False)


@torch.no_grad()
def share_right(model: MoLoRAModel, products: Sequence[Product], per_product: int) -> float:
    """Of the answers' tokens: on how many the product's own adapter acts."""
    right = count = 0
    for one in products:
        examples = one.examples(UNSEEN, "test")[::2][:per_product]
        batch = collate(encode_within(examples, model.tokenizer, MOST, [one.label]), 0).to(DEVICE)
        routes = model(batch.input_ids, batch.attention_mask, output_routes=True, logits_to_keep=1).routes
        answered = batch.labels != IGNORED
        right += int((routes.slots[..., 0] == routes.names.index(f"{LAYER}/{one.label}"))[answered].sum())
        count += int(answered.sum())
    return right / count


def answers(model: MoLoRAModel, products: Sequence[Product], per_product: int, choice: Any) -> float:
    """The share of held-out questions that are answered rightly; choice: of the layer, None for each product's own."""
    asked = [(one, example) for one in products for example in one.examples(UNSEEN, "test")[1::2][:per_product]]
    right = 0
    for start in range(0, len(asked), 40):
        some = asked[start : start + 40]
        texts = [render(model.tokenizer, example.messages[:1], add_generation_prompt=True) for _, example in some]
        inputs = model.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        selection = [{LAYER: one.label if choice == "by name" else choice} for one, _ in some]  # each its own
        given = {name: inputs[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
        ids = model.generate(**given, selection=selection, max_new_tokens=9, do_sample=False)
        said = model.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wanted = [example.messages[1]["content"].rstrip(".") for _, example in some]
        right += sum(want.lower() in one.lower() for want, one in zip(wanted, said, strict=True))
    return right / len(asked)


def two_products(model: MoLoRAModel, one: Product, other: Product, console: Console) -> tuple[int, int]:
    """A chat that goes from one product to another; passes and tokens of what is generated."""
    asked = UNSEEN["warranty"][0].format(one.name), UNSEEN["reset"][0].format(other.name)
    messages = [*chat(asked[0], one.facts["warranty"]), {"role": "user", "content": asked[1]}]
    with counted(model.base.model) as passes:
        said = list(model.stream(messages, max_new_tokens=9, do_sample=False))
    acted = [next((name for _, name, _ in token.route if name), "none") for token in said]
    text = "".join(token.text for token in said)
    console.print(f"After a turn about the {one.name}: {asked[1]}")
    console.print(f"  {text!r} by {', '.join(dict.fromkeys(acted))}; right is {other.facts['reset']!r}. "
                  f"{len(said)} tokens, {len(passes)} passes, one cache.")  # fmt: skip
    return len(passes), len(said)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """One entry for each forward of ``module`` within."""
    found: list[int] = []
    hook = module.register_forward_hook(lambda *_: found.append(1))
    try:
        yield found
    finally:
        hook.remove()


def run(
    base: str,
    work: Path,
    products: int = 60,
    how: Schedule | None = None,
    rank: int = 4,
    last: int = 4,
    mixed: int = 120,
    router_epochs: int = 12,
    per_product: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    console: Console | None = None,
) -> Found:
    """Builds the desk in ``work`` and judges it.

    Args:
        how: each adapter's training. rank, last: of an adapter, and in how many of the last layers it lies.
        mixed, router_epochs: conversations that change their product, and passes over so many.
        per_product: held-out questions of each product for the routes, and as many others for the answers.
    """
    console, how = console or Console(), how or Schedule(learning_rate=1e-2, epochs=10, batch_tokens=64, seed=seed)
    *desk, late = make_products(products + 1, seed)
    clock = Clock(console)
    plain, tokenizer = load_base(base, dtype=dtype, progress=False)
    plain.to(DEVICE).requires_grad_(False)
    train(plain, tokenizer, desk, work / "adapters", how, rank, last)
    clock(f"{products} adapters trained")
    train_router(base, desk, work, mixed, router_epochs)
    clock("router trained")
    model = MoLoRAModel.from_pretrained(work / "desk", base=plain, tokenizer=tokenizer)
    right = share_right(model, desk, per_product)
    clock(
        f"{right:.1%} of the answers' tokens go to the right one of {products} adapters (by chance {1 / products:.1%})"
    )

    found = {name: answers(model, desk, per_product, choice) for name, choice in
             {"base": None, "routed": "auto", "right adapter by name": "by name"}.items()}  # fmt: skip
    model.merge(LAYER, [one.label for one in desk], "all-in-one", work / "merged")
    found["all merged into one"] = answers(model, desk, per_product, "all-in-one")
    model.remove_adapter(LAYER, "all-in-one")
    table = Table("", "right answers", title=f"{products * per_product} held-out questions, greedy")
    for name, share in found.items():
        table.add_row(name, f"{share:.1%}")
    console.print(table)
    clock("questions answered")
    passes, tokens = two_products(model, desk[0], desk[1], console)
    kept, whole = total_bytes(model.adapters.values()), sum(p.nbytes for p in plain.parameters())
    console.print(f"Memory: base {whole / 1e6:.0f} MB, all adapters {kept / 1e6:.0f} MB, router "
                  f"{sum(p.nbytes for p in model.router.parameters()) / 1e6:.0f} MB; "
                  f"{products} models of their own would take {products * whole / 1e9:.1f} GB.")  # fmt: skip

    clock("the rest")
    bare, _ = load_base(base, dtype=dtype, progress=False)  # the desk's own base goes on serving
    train(bare.to(DEVICE), tokenizer, [late], work / "adapters", how, rank, last)
    clock("the new product's adapter trained")
    texts = [render(tokenizer, example.messages) for example in late.examples(ASKED)]
    model.add_adapter(LAYER, late.label, work / "adapters" / late.label, examples=texts)
    clock("added to the live desk, its row of the router fitted")
    new, others = share_right(model, [late], 4), share_right(model, desk, per_product)
    told = answers(model, [late], 4, "auto")
    console.print(f"It gets {new:.1%} of its answers' tokens and tells {told:.0%} of its facts.")
    console.print(f"The others get {others:.1%} of theirs, {right:.1%} before it came.")
    clock("judged")
    return Found(right, found, passes, tokens, new, others, told)


class Clock:
    """Says what the time since the last call went into."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, (time.monotonic(), time.process_time())

    def __call__(self, what: str) -> None:
        now = time.monotonic(), time.process_time()
        self.console.print(f"[dim]{now[0] - self.last[0]:6.1f} s, CPU {now[1] - self.last[1]:6.1f} s[/dim]  {what}")
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE, help="of the Llama architecture")
    parser.add_argument("--products", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10, help="of each adapter (default: 10)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--last", type=int, default=4, help="in how many of the last layers adapters lie (default: 4)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the frozen base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=Path, help="a folder that keeps the adapters; those in it are not trained")
    args = parser.parse_args()
    logging.disable_progress_bar()
    how = Schedule(learning_rate=1e-2, epochs=args.epochs, batch_tokens=64, seed=args.seed)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapters is not None:
            args.adapters.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / "adapters").symlink_to(args.adapters.resolve())
        run(args.base, Path(scratch), args.products, how, args.rank, args.last, dtype=dtype, seed=args.seed)


if __name__ == "__main__":
    main()
