"""Does an adapter know what was talked about? Many conversations, learnt one by one, and questions about all of them.

Beside the adapter stand the base, a search over the same conversations, which is what users would do without adapters,
and both. What was not discussed are topics of the bank that nothing was trained on, and, where the file has more
conversations than are learnt, topics of those: they sound as what was discussed does.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm

from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora.personalize.history import Interaction
from molora.personalize.retrieval import Encoder, Retriever, text_of
from molora_training.continual.growth import blank
from molora_training.document_table import rouge_l
from molora_training.evaluate import bootstrap
from molora_training.parts import Part, drop_tensors, file_name, finished, keep_tensors, kept_tensors, mark_of
from molora_training.plum.conversations import Conversation
from molora_training.plum.learn import learn_in_turn, pairs_of
from molora_training.plum.learner import Learner, Learning
from molora_training.plum.pairs import Pair, negative
from molora_training.plum.topics import discussed, exchanges, hashed, stems, topics
from molora_training.report import heading, line, machine, write_report
from molora_training.speaker import Speaker

COUNT = 100  # conversations
TOLD = 96  # tokens of an answer to an open question
TOP = 3  # exchanges that a search puts into the prompt
SHOWN = 600  # characters of each
AGES = 5  # groups of conversations, the oldest first
PAPER = 0.815  # of questions about 100 conversations, arXiv 2411.13405
NEAR = 0.05  # by which an adapter may be behind a search
WAYS = {"base": (False, False), "adapter": (True, False), "search": (False, True), "adapter and search": (True, True)}
"""Whether the adapter acts, and whether what a search finds stands before the question."""


@dataclass(frozen=True)
class Asked:
    """A question, the conversation that it came with, and whether its topic is of one that was not learnt."""

    pair: Pair
    of: int
    unseen: bool = False


def run(
    every: Sequence[Conversation],
    out: Path,
    command: str,
    encoder: Encoder | None = None,
    base: str = DEFAULT_BASE,
    count: int = COUNT,
    top: int = TOP,
    learning: Learning | None = None,
    encoder_name: str = "",
) -> dict[str, Any]:
    """Learns one user's conversations, asks about all of them, and writes ``out``.

    Args:
        every: conversations, in the order in which they were had.
        out: the report; what is finished lies in a hidden folder beside it, and is not done again.
        command: to be named in it.
        encoder: of the search; None: it looks for words alone. encoder_name: as its users name it.
        base: folder or Hub id.
        count: how many are learnt; of those that follow nothing is.
        top: exchanges that the search finds for a question.
        learning: how; None: as `molora learn` does.

    Raises:
        ConfigError: ``count`` or ``top`` is below 1. DataError: there is nothing to ask about.
    """
    if min(count, top) < 1:
        raise ConfigError(f"count and top must be whole numbers from 1, not {count} and {top}.")
    learning = learning or Learning()
    past, others = every[:count], every[count:]
    taught, asked, open_ = questions(past, others, learning)
    known = frozenset[str]().union(*(discussed(one.messages) for one in past))
    work = out.parent / f".{out.stem}"
    said = [[one.messages for one in some] for some in (past, others)]
    mark = mark_of([said, base, top, encoder_name, asdict(learning), machine()])
    learnt = cache(lambda: _learnt(base, taught, known, learning, work, mark))
    search = Retriever([one for each in past for one in exchanges(each.messages)], encoder)

    def make(index: int) -> Part:
        learner, seconds = learnt()
        if not index:
            return {"seconds": statistics.median(seconds)}
        return _answers(learner, list(WAYS)[index - 1], search, top, asked, open_)

    kept = finished(work, ["learning", *map(file_name, WAYS)], mark, (0, 1), make)
    assert kept is not None  # for nobody else makes some
    found = dict(zip(WAYS, kept[1:], strict=True))
    report = {
        **heading(
            command,
            f"{len(past)} conversations of one user, {len(asked)} closed and {len(open_)} open questions, "
            f"{len(others)} conversations not learnt",
        ),
        "seed": learning.seed,
        "learning": asdict(learning),
        "encoder": encoder_name,
        "rows": [{**row(name, one["says_yes"], asked), **open_row(one["told"], open_)} for name, one in found.items()],
        "by_age": by_age(found["adapter"], asked, open_, len(past)),
        "seconds": kept[0]["seconds"],
    }
    report["must"] = must(report)
    write_report(report, out)
    drop_tensors(work)
    return report


def _learnt(
    base: str, taught: Sequence[Sequence[Pair]], known: frozenset[str], learning: Learning, work: Path, mark: str
) -> tuple[Learner, list[float]]:
    """An adapter that has learnt all, and the seconds of each conversation. It is kept after each, and goes on from
    there: nothing but its weights and the names of topics goes from one conversation to the next."""
    model, tokenizer = load_base(base, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        blank(base, learning.rank, Path(scratch) / "blank", learning.seed)
        learner = Learner(model, tokenizer, Path(scratch) / "blank", learning, base)
    file = work / "adapter.safetensors"
    weights, about = kept_tensors(file, mark) or ({}, {"learnt": 0, "seconds": [], "topics": []})
    for name, tensor in weights.items():
        learner.parameters[name].data.copy_(tensor)
    seconds: list[float] = about["seconds"]
    topics: list[str] = about["topics"]
    for number in tqdm(range(about["learnt"], len(taught)), desc="conversations"):
        started = time.monotonic()
        if taught[number]:
            _, topics = learn_in_turn(learner, [taught[number]], topics, known)
            seconds.append(time.monotonic() - started)
        now = {name: parameter.detach() for name, parameter in learner.parameters.items()}
        keep_tensors(file, mark, now, {"learnt": number + 1, "seconds": seconds, "topics": topics})
    learner.settle()
    return learner, seconds


def questions(
    past: Sequence[Conversation], others: Sequence[Conversation], learning: Learning
) -> tuple[list[list[Pair]], list[Asked], list[Asked]]:
    """What is learnt by conversation, and the closed and the open questions about all of them in wordings that are not.

    Args:
        past: that are learnt. others: of whose topics those that share no word with what was discussed are negatives.
        learning: how.

    Raises:
        DataError: there is nothing to ask about.
    """
    taught, judged = pairs_of(past, frozenset(), learning)
    said = {hashed(one) for each in past for m in each.messages for one in stems(m["content"])}
    unseen = [topic for one in others for topic in topics(one.messages) if apart(topic, said)]
    chance = Random(f"{learning.seed}/unseen")
    asked: list[Asked] = []
    for number, pairs in enumerate(judged):
        closed = [pair for pair in pairs if pair.closed]
        asked += [Asked(pair, number) for pair in closed]
        if unseen:
            positives = [pair for pair in closed if pair.discussed]
            asked += [Asked(negative(pair, chance.choice(unseen)), number, unseen=True) for pair in positives]
    open_ = [Asked(pair, number) for number, pairs in enumerate(judged) for pair in pairs if not pair.closed]
    if {one.pair.discussed for one in open_} != {True, False}:  # of closed ones there are as many
        raise DataError("In these conversations nothing was talked about that could be asked about, or everything was.")
    return taught, asked, open_


def apart(topic: str, said: set[str]) -> bool:
    """Whether none of a topic's words is among the hashes of what was said, and it has one that could be."""
    own = stems(topic)
    return bool(own) and not any(hashed(one) in said for one in own)


def _answers(
    learner: Learner, way: str, search: Retriever, top: int, closed: Sequence[Asked], open_: Sequence[Asked]
) -> Part:
    """Whether one of WAYS says yes to each closed question, and what it says to each open one."""
    adapted, searched = WAYS[way]
    prompts, open_prompts = (
        [prompt_of(question, search.top(question, top) if searched else []) for question in some]
        for some in ([one.pair.question for one in each] for each in (closed, open_))
    )
    with nullcontext() if adapted else learner.off():
        # A small base leaves a GPU idle unless it is asked much at once.
        batch = 256 if torch.cuda.is_available() else 32
        told = Speaker(learner.model, learner.tokenizer, batch, TOLD).answers(open_prompts)
        return {"says_yes": learner.says_yes(prompts), "told": told}


def open_row(said: Sequence[str], asked: Sequence[Asked]) -> dict[str, float]:
    """Of answers to open questions ROUGE-L to what was said where it was, and elsewhere the share that say that nothing
    was."""
    pairs = [(text, one.pair) for text, one in zip(said, asked, strict=True)]
    return {
        "open_positives": statistics.mean(rouge_l(text, pair.answer) for text, pair in pairs if pair.discussed),
        "open_negatives": statistics.mean(float("not talked" in text) for text, pair in pairs if not pair.discussed),
    }


def prompt_of(question: str, found: Sequence[Interaction | str]) -> str:
    """A question with what was found for it, cut to ``SHOWN`` characters each; the question alone where that is
    nothing."""
    if not found:
        return question
    shown = "\n\n".join(text_of(one)[:SHOWN] for one in found)
    return f"Of our earlier conversations:\n\n{shown}\n\n{question}"


def row(name: str, said: Sequence[bool], asked: Sequence[Asked]) -> dict[str, Any]:
    """Shares of right answers: of positives, of negatives, and the mean of both with its interval over conversations;
    of those about topics of other conversations apart, null where there are none."""
    right = torch.tensor([yes == one.pair.discussed for yes, one in zip(said, asked, strict=True)], dtype=torch.float64)
    signs = torch.tensor([one.pair.discussed for one in asked])
    unseen = torch.tensor([one.unseen for one in asked])
    of = torch.tensor([one.of for one in asked])
    size = int(of.max()) + 1

    def sums(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = which.double()
        empty = torch.zeros(size, dtype=torch.float64)
        return empty.index_add(0, of, right * kept), empty.index_add(0, of, kept)

    (yes, asked_yes), (no, asked_no) = sums(signs), sums(~signs)

    def accuracy(index: torch.Tensor) -> torch.Tensor:
        shares = (a[index].sum(-1) / b[index].sum(-1).clamp_min(1) for a, b in ((yes, asked_yes), (no, asked_no)))
        return sum(shares, torch.zeros(())) / 2

    return {
        "contender": name,
        "positives": float(right[signs].mean()),
        "negatives": float(right[~signs].mean()),
        "negatives_unseen": float(right[unseen].mean()) if unseen.any() else None,
        "accuracy": float(accuracy(torch.arange(size))),
        "accuracy_interval": list(bootstrap(accuracy, size)),
    }


def by_age(found: Part, closed: Sequence[Asked], open_: Sequence[Asked], count: int) -> list[dict[str, Any]]:
    """The share of closed positives that are answered right, and ROUGE-L of open ones, by when their conversation was,
    the oldest first.

    Args:
        found: what was said to ``closed`` and ``open_``.
        count: conversations.
    """
    groups: dict[int, dict[str, list[float]]] = {}
    for name, asked, worth in (
        ("positives", closed, map(float, found["says_yes"])),
        ("open_positives", open_, map(rouge_l, found["told"], (one.pair.answer for one in open_))),
    ):
        for one, value in zip(asked, worth, strict=True):
            if one.pair.discussed:
                groups.setdefault(one.of * AGES // max(count, AGES), {}).setdefault(name, []).append(value)
    return [
        {"group": group, **{name: statistics.mean(some) for name, some in each.items()}}
        for group, each in sorted(groups.items())
    ]


def must(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that are to be reached."""
    found = {one["contender"]: one["accuracy"] for one in report["rows"]}
    behind = found["search"] - found["adapter"]
    told = {one["contender"]: one["open_positives"] for one in report["rows"]}
    both = {one["contender"]: (one["open_positives"] + one["open_negatives"]) / 2 for one in report["rows"]}
    return [
        line("questions about all conversations that the adapter answers right", found["adapter"], PAPER, "higher"),
        line("by how much a search is better than the adapter", behind, NEAR, "lower"),
        line("what the adapter adds to a search", found["adapter and search"] - found["search"], 0.0, "higher"),
        line(
            "open questions, what was not discussed among them: above a search",
            both["adapter"] - both["search"],
            0.0,
            "higher",
            "mean of ROUGE-L and of the share that is told not to have been discussed",
        ),
        line(
            "open questions about what was discussed: ROUGE-L above a search's",
            told["adapter"] - told["search"],
            0.0,
            "higher",
        ),
    ]
