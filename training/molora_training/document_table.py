"""What does an adapter that was made of a document know of it? Needles by length, questions about passages, those that
are answered by yes or no apart from the others (of these half is right by chance), and questions for facts in filler,
in wordings and of kinds that no training has.

Beside the right adapter stand another text's, one of the text with its words shuffled, the text in the prompt, and what
a search over all texts puts there, which is what users would do without adapters. The network gives every text the same
adapter beside its own: how to answer such questions. So that how is not taken for what, it stands alone (the floor, if
the base is not above it) and beside the text in the prompt (the ceiling, if the base without it is not above it).
"""

import json
import random
import re
import statistics
import string
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from molora.base import load_base
from molora.errors import DataError
from molora.factors import Factors, cut, write_factors
from molora.personalize.document_net import DocumentNet, of_text
from molora.personalize.documents import chunks
from molora.personalize.internalize import factors_of
from molora.personalize.retrieval import Encoder, Retriever
from molora_training.data import Encoded, encode_within, read_examples
from molora_training.data.lessons import KINDS, Lesson, of_kind, read_lessons
from molora_training.evaluate import bootstrap
from molora_training.hypernet.document import METRICS
from molora_training.hypernet.facts import JUDGED, facts
from molora_training.hypernet.lessons import Needles
from molora_training.report import heading, line, write_report
from molora_training.speaker import Speaker

TIMES = (1, 2, 4, 16)  # the longest text in training
NEW_TOKENS = 32
QUESTIONS = 2  # about each passage
PIECE, PIECES = 128, 3  # tokens of what is searched, and how many of them go into the prompt
TOLD = 256  # tokens of a text that tells facts, about
LONG = 2000  # tokens of the document that is timed
CUT = 8  # the rank that memory is held to
OWN, OTHER = "adapter of the text", "adapter of another text"
SHARED, GIVEN = "what every text has", "text in the prompt"
OVER = f"{OWN}, over that of another"

Prompt = Callable[[Lesson, str], str]


@dataclass(frozen=True)
class Contender:
    """prompt: what stands before the question, of a text and the question. factors: of a text by its place; None: no
    adapter."""

    name: str
    prompt: Prompt
    factors: Callable[[int], Factors] | None = None


def run(
    folder: Path,
    data: Path,
    encoder: Encoder | None,
    out: Path,
    command: str,
    limit: int = 200,
    needles: int = 64,
    general: str = "science",
) -> dict[str, Any]:
    """Measures a document network and writes ``out``.

    Args:
        folder: of the network.
        data: prepared data: passages, and what is called ``general``.
        encoder: of the search over all texts; None: it looks for words alone.
        out: the report.
        command: to be named in it.
        limit: passages of the test split with questions of a kind. needles: texts of each length.
        general: a domain of conversations that have nothing to do with any passage.

    Raises:
        DataError: questions about fewer than two passages are answered in words.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # which is faster on a CPU
    net = DocumentNet.load(folder, dtype)
    base, tokenizer = load_base(net.config.base, dtype=dtype)
    base.to(device).requires_grad_(False).eval()
    # A small base leaves a GPU idle unless it is asked much at once.
    table = Table(base, tokenizer, net.to(device), encoder, batch=256 if device == "cuda" else 32)
    test = read_lessons(data / "passages.test.jsonl")
    asked: dict[str, list[Lesson]] = {
        kind: [Lesson(one.text, one.questions[:QUESTIONS]) for one in of_kind(test, kind)[:limit]] for kind in KINDS
    }
    lessons = asked["words"]
    if len(lessons) < 2:  # one has no other text's adapter to stand beside its own
        raise DataError(f"{data}/passages.test.jsonl asks about fewer than two passages for more than yes or no.")
    apart = encode_within(read_examples(data / f"{general}.test.jsonl")[:limit], tokenizer, 1024, [general])
    for kind, judged in JUDGED.items():
        chance = random.Random(f"table/{kind}")
        asked[kind] = [facts().lesson(chance, TOLD, judged) for _ in range(limit)]
    rows = [{"kind": kind, **row} for kind, some in asked.items() if len(some) > 1 for row in table.passages(some)]
    made = json.loads((folder / METRICS).read_text(encoding="utf-8")) if (folder / METRICS).is_file() else {}
    trained = made.get("longest") or net.config.chunk
    recall = [
        {"times": times, "tokens": times * trained, **table.recall(times * trained, needles)}
        for times in tqdm(TIMES, desc="needles")
    ]
    report = {
        **heading(
            command,
            f"of the test split {len(lessons)} passages with questions that are answered in words and "
            f"{len(asked['yes or no'])} with yes or no, {needles} needles of each length",
        ),
        "task": made.get("settings", {}).get("task", "needle"),
        "network": json.loads((folder / "hypernet.json").read_text(encoding="utf-8")),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "rows": rows,
        "needles": recall,
        "unrelated": table.unrelated(apart, lessons),
        "cost": table.cost(lessons),
    }
    write_report({**report, "must": must(report)}, out)
    return {**report, "must": must(report)}


class Table:
    """Answers of a base under generated adapters."""

    def __init__(
        self, base: Any, tokenizer: Any, net: DocumentNet, encoder: Encoder | None = None, batch: int = 32
    ) -> None:
        self.base, self.tokenizer, self.net, self.encoder = base, tokenizer, net, encoder
        self.speaker = Speaker(base, tokenizer, batch, NEW_TOKENS)

    def factors(self, text: str, rank: int | None = None) -> Factors:
        return factors_of(self.base, self.tokenizer, self.net, text, rank)

    def passages(self, lessons: Sequence[Lesson]) -> list[dict[str, Any]]:
        """Every contender's answers, by F1, ROUGE-L and exact match, each with its interval over texts.

        The last row is by how much the text's own adapter is ahead of another's, text by text.
        """
        own = [self.factors(lesson.text) for lesson in lessons]
        mixed = [self.factors(_shuffled(lesson.text)) for lesson in lessons]
        pieces = [piece for lesson in lessons for piece in chunks(lesson.text, self.tokenizer, PIECE)]
        search = Retriever(pieces, self.encoder)
        shared = of_text(self.base, {name: (A[None], B[None]) for name, (A, B) in self.net.learned().items()}, 0)

        def alone(_: Lesson, question: str) -> str:
            return question

        def given(lesson: Lesson, question: str) -> str:
            return f"{lesson.text}\n\n{question}"

        contenders = [
            Contender("base", alone),
            Contender(OWN, alone, own.__getitem__),
            Contender(f"{OWN}, cut to rank {CUT}", alone, lambda place: cut(own[place], CUT)),
            Contender(OTHER, alone, lambda place: own[(place + 1) % len(own)]),
            Contender("adapter of the text's words, shuffled", alone, mixed.__getitem__),
            Contender(SHARED, alone, lambda _: shared),
            Contender(GIVEN, given),
            Contender(f"{GIVEN}, with {SHARED}", given, lambda _: shared),
            Contender("search over all texts", lambda _, q: "\n".join([*map(str, search.top(q, PIECES)), "", q])),
        ]
        scores = {one.name: self._scores(one, lessons) for one in tqdm(contenders, desc="passages")}
        scores[OVER] = {name: each - scores[OTHER][name] for name, each in scores[OWN].items()}
        return [{"contender": name, **_means(by_metric)} for name, by_metric in scores.items()]

    def recall(self, tokens: int, count: int) -> dict[str, Any]:
        """The share of needles whose number is said, in texts of so many tokens: whole, and cut to a rank."""
        lessons = Needles((tokens, tokens), seed=1, count=count).of_length(tokens)
        factors = [self.factors(lesson.text) for lesson in lessons]
        found: dict[str, Any] = {"rank": max(len(A) for A, _ in factors[0].values())}
        for name, some in (("recall", factors), (f"recall at rank {CUT}", [cut(one, CUT) for one in factors])):
            said = self.speaker.answers([lesson.questions[0][0] for lesson in lessons], some)
            wanted = [numbers(lesson.questions[0][1])[0] for lesson in lessons]
            found[name] = statistics.mean(float(one in numbers(text)) for one, text in zip(wanted, said, strict=True))
        return found

    def unrelated(self, rows: Sequence[Encoded], lessons: Sequence[Lesson]) -> dict[str, float]:
        """Nats an answer token of conversations about other things: of the base, and with a text's adapter."""
        made = [self.factors(lesson.text) for lesson in lessons[: len(rows)]]
        own = [made[place % len(made)] for place in range(len(rows))]
        found = {}
        for name, factors in (("base", None), ("adapter", own)):
            total, count = self.speaker.losses(rows, factors).sum(0).tolist()
            found[name] = total / count
        return found

    def cost(self, lessons: Sequence[Lesson], times: int = 5) -> dict[str, float]:
        """Seconds to make a document of 2,000 tokens an adapter, its bytes on disk, and the memory that it took."""
        text = "\n".join(lesson.text for lesson in lessons)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: offsets[min(LONG, len(offsets)) - 1][1]]
        cuda = self.base.device.type == "cuda"
        seconds = []
        for _ in range(times):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            factors = self.factors(text)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        sizes = {}
        with tempfile.TemporaryDirectory() as place:
            for name, some in (("bytes", factors), (f"bytes at rank {CUT}", cut(factors, CUT))):
                write_factors(Path(place) / name, some, self.net.config.base)
                sizes[name] = float(sum(file.stat().st_size for file in (Path(place) / name).iterdir()))
        peak = {"peak_bytes": float(torch.cuda.max_memory_allocated())} if cuda else {}
        return {"tokens": float(min(LONG, len(offsets))), "seconds": statistics.median(seconds), **sizes, **peak}

    def _scores(self, one: Contender, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
        """By metric, float64 [texts]: the mean over a text's questions."""
        asked = [(place, q, a) for place, lesson in enumerate(lessons) for q, a in lesson.questions]
        prompts = [one.prompt(lessons[place], question) for place, question, _ in asked]
        made = None if one.factors is None else [one.factors(place) for place in range(len(lessons))]
        said = self.speaker.answers(prompts, None if made is None else [made[place] for place, _, _ in asked])
        owner = torch.tensor([place for place, _, _ in asked])
        found = {}
        for name, metric in (("f1", f1), ("rouge_l", rouge_l), ("exact", exact)):
            each = [metric(text, answer) for text, (_, _, answer) in zip(said, asked, strict=True)]
            by_text = torch.zeros(len(lessons), dtype=torch.float64)
            by_text.index_add_(0, owner, torch.tensor(each, dtype=torch.float64))
            found[name] = by_text / torch.bincount(owner, minlength=len(lessons))
        return found


def _means(scores: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, by_text in scores.items():
        found[name] = float(by_text.mean())
        found[f"{name}_interval"] = list(bootstrap(lambda index, b=by_text: b[index].mean(-1), len(by_text)))  # type: ignore[misc]
    return found


def must(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that are to be reached. Of questions about passages those that are answered in words count; how much of
    the same gain another text's adapter has is told beside, since that much is not of the text."""
    rows = {row["contender"]: row for row in report["rows"] if row["kind"] == "words"}
    lines = []
    for times, bar in ((4, 0.95), (16, 0.80)):
        found = next(one for one in report["needles"] if one["times"] == times)
        lines.append(line(f"needle: recall at {times} times the length", found[f"recall at rank {CUT}"], bar, "higher"))
    for name, shown in (("f1", "F1"), ("rouge_l", "ROUGE-L")):
        own = rows[OWN][name]
        floor = max(rows["base"][name], rows[SHARED][name])
        ceiling = max(rows[GIVEN][name], rows[f"{GIVEN}, with {SHARED}"][name])
        if ceiling > floor:
            share = (own - floor) / (ceiling - floor)
            note = f"another text's adapter: {(rows[OTHER][name] - floor) / (ceiling - floor):.3f}"
        else:
            share = 0.0
            note = f"no text in the prompt helps the base: {ceiling:.1%} with it, {own:.1%} with the text's adapter"
        lines.append(line(f"passages: share of the ceiling's gain, {shown}", share, 0.75, "higher", note))
    apart = rows[OVER]["f1_interval"][0]  # or the gain is of how to answer, not of the text
    lines.append(line("passages: F1 over another text's adapter, lower end of the interval", apart, 0.0, "higher"))
    unrelated = report["unrelated"]
    growth = unrelated["adapter"] / unrelated["base"] - 1
    lines.append(line("unrelated text: loss over the base's", growth, 0.03, "lower"))
    bar = 5.0 if "peak_bytes" not in report["cost"] else 0.150
    lines.append(line("seconds for 2,000 tokens", report["cost"]["seconds"], bar, "lower"))
    return lines


def f1(said: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD counts them (arXiv 1606.05250)."""
    ours, theirs = _plain(said), _plain(answer)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs)) if both else float(ours == theirs)


def exact(said: str, answer: str) -> float:
    return float(_plain(said) == _plain(answer))


def rouge_l(said: str, answer: str) -> float:
    from rouge_score import rouge_scorer

    return float(rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(answer, said)["rougeL"].fmeasure)


def _plain(text: str) -> list[str]:
    """Words in lower case, without articles and punctuation."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def numbers(text: str) -> list[str]:
    """Whole: 1234 is not in 12345."""
    return re.findall(r"\d+", text)


def _shuffled(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)
