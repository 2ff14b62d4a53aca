"""Train the network that makes adapters of documents (arXiv 2602.15902); the base stays frozen.

Stage 1: texts of one chunk. Stage 2, ``start`` naming what stage 1 made: longer ones. The paper finds stage 2 unstable
without stage 1. Stage 3: passages, with needles among them. Several processes share each step.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError
from molora.personalize.document_net import DocumentNet, DocumentNetConfig
from molora_training.attention import attend_causally
from molora_training.data import data_dir
from molora_training.data.lessons import Lesson
from molora_training.hypernet.apart import Apart
from molora_training.hypernet.document_card import model_card
from molora_training.hypernet.document_objective import DocumentLoss, DocumentObjective
from molora_training.hypernet.lessons import Lessons, Mixed, Needles, Passages
from molora_training.hypernet.loop import Loop, LoopSettings
from molora_training.processes import Processes
from molora_training.settings import work_folder

METRICS = "metrics.json"
_AT_ONCE = 16  # texts of the validation


@dataclass(frozen=True)
class NetShape:
    """See :class:`DocumentNetConfig`."""

    modules: tuple[str, ...] = ("down_proj",)
    rank: int = 8
    width: int = 128
    latents: int = 8
    blocks: int = 4
    heads: int = 8
    exit: int = 0
    chunk: int = 256


@dataclass(frozen=True)
class DocumentHypernetSettings:
    """What is trained, and on what.

    Args:
        out: folder of the result.
        task: "needle": a number in filler, made up as it goes; "passages": ``data``/<name>.train.jsonl.
        data, name: of the passages. questions: of a passage in a step, at most. gaps: more of them, made of its text.
        needles: of a step's texts so many are needles, beside passages.
        apart: prepared data that has nothing to do with the texts, for ``loss.apart``.
        tokens: of a needle's text, the shortest and the longest. grow: steps over which the longest gets there
            from the shortest; None: half of all. facts: share of the needles that are facts of configs/facts.yaml.
        start: folder of a network to go on from; its shape is kept.
        net: shape of a new one.
        loss: weights of the terms.
        texts: in a step.
        loop: steps, learning rate and the like.
        validation: held-out texts that are looked at, at most.
        dtype: of the base; the network learns in float32.
    """

    out: Path
    loop: LoopSettings
    task: Literal["needle", "passages"] = "needle"
    data: Path = field(default_factory=data_dir)
    name: str = "passages"
    questions: int = 4
    gaps: int = 0
    needles: int = 0
    apart: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (12, 256)
    grow: int | None = None
    facts: float = 0.0
    base: str = DEFAULT_BASE
    start: Path | None = None
    net: NetShape = field(default_factory=NetShape)
    loss: DocumentLoss = field(default_factory=DocumentLoss)
    texts: int = 16
    validation: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.texts < 1 or self.questions < 1 or self.validation < 1 or self.gaps < 0:
            raise ConfigError("texts, questions and validation must be whole numbers from 1, gaps from 0.")
        if self.needles < 0 or self.needles >= self.texts or (self.needles and self.task != "passages"):
            raise ConfigError("needles, beside passages, must be from 0 to less than texts.")
        if self.loss.keep and self.texts < 2:
            raise ConfigError("With loss.keep a step needs two texts or more: set texts to 2 or more.")
        if bool(self.loss.apart) != bool(self.apart):
            raise ConfigError("loss.apart and apart go together: a weight, and the names of prepared data.")
        if not 0 <= self.facts <= 1:
            raise ConfigError(f"facts must be a share from 0 to 1, not {self.facts}.")
        if len(self.tokens) != 2 or not 1 <= self.tokens[0] <= self.tokens[1]:
            raise ConfigError(f"tokens must be the shortest and the longest text, not {list(self.tokens)}.")

    @property
    def work(self) -> Path:
        return work_folder("hypernet", self.out)


def train(
    settings: DocumentHypernetSettings,
    resume: bool = True,
    command: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains and writes the network to ``settings.out``; checkpoints and curves lie in ``settings.work``.

    Returns:
        The metrics of metrics.json.

    Raises:
        ConfigError: settings that do not fit. DataError: no passages. HypernetError: ``start`` is none, or another
        base's. NonFiniteError: the loss is not finite; the last checkpoint stays.
    """
    started = time.monotonic()
    processes = Processes()
    processes.need(settings.texts, "texts")
    device = processes.device if torch.cuda.is_available() else torch.device("cpu")
    with processes.main_first():
        base, tokenizer = load_base(settings.base, dtype=getattr(torch, settings.dtype))
    base.to(device).requires_grad_(False).eval()
    attend_causally(base, 1 << 20)
    net = make_net(settings, base).to(device).train()
    lessons = lessons_of(settings)
    objective = DocumentObjective(base, tokenizer, net, settings.loss)
    held_out = {kind: some[: settings.validation] for kind, some in lessons.held_out().items()}
    apart = Apart(settings.data, settings.apart, tokenizer, settings.loop.seed)

    def loss(step: int) -> dict[str, torch.Tensor]:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=device.type == "cuda" and settings.dtype == "bfloat16"
        ):
            texts = settings.texts
            return objective(lessons.of_step(step, texts), processes.stretch(texts), apart.of_step(step, texts))

    loop = Loop(
        loss,
        dict(net.named_parameters()),
        lambda: validate(objective, held_out, processes),
        "gold" if settings.loss.gold else "distil",
        settings.work,
        settings.loop,
        _fingerprint(settings),
        f"hypernet {settings.out.name}",
        processes,
    )
    counters = loop.run(resume, on_step)
    metrics = {
        "validation": counters["best"][1],
        "best_step": counters["best"][0],
        "validations": counters["validation"],
        "losses": counters["losses"],
        "longest": longest(settings),
        "steps": settings.loop.steps,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processes": processes.count,
        "command": command,
        "settings": json.loads(json.dumps(asdict(settings), default=lambda value: value.name)),
    }
    if processes.is_main:
        shutil.rmtree(settings.out, ignore_errors=True)
        net.save(settings.out)
        draft = settings.out / f".{METRICS}"
        draft.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, settings.out / METRICS)
        card = model_card(settings.out.name, settings.base, net.config, metrics)
        (settings.out / "README.md").write_text(card, encoding="utf-8")
    loop.done()
    return metrics


def make_net(settings: DocumentHypernetSettings, base: Any) -> DocumentNet:
    """A new network, or the one to go on from."""
    if settings.start is None:
        torch.manual_seed(settings.loop.seed)
        net = DocumentNet(DocumentNetConfig.for_base(base, settings.base, **asdict(settings.net)))
    else:
        net = DocumentNet.load(settings.start)
        net.check(base, settings.base)
    net.config = replace(net.config, together=-(-longest(settings) // net.config.chunk))
    return net


def lessons_of(settings: DocumentHypernetSettings) -> Lessons:
    """What it learns from."""
    (first, last), seed = settings.tokens, settings.loop.seed
    if settings.task == "needle":
        grow = settings.loop.steps // 2 if settings.grow is None else settings.grow
        return Needles((first, last), seed=seed, count=settings.validation, grow=grow, facts=settings.facts)
    passages = Passages(settings.data, settings.name, settings.questions, seed, settings.gaps)
    if not settings.needles:
        return passages
    # They were learnt before: no need to grow.
    needles = Needles((first, last), seed=seed, count=settings.validation, facts=settings.facts)
    return Mixed(passages, needles, settings.needles)


def longest(settings: DocumentHypernetSettings) -> int:
    """Tokens of the longest needle's text that the network, or those it goes on from, had in training, about."""
    own = settings.tokens[1] if settings.task == "needle" or settings.needles else 0
    if settings.start is None or not (settings.start / METRICS).is_file():
        return own
    before = json.loads((settings.start / METRICS).read_text(encoding="utf-8"))
    return max(own, int(before.get("longest", 0)))


@torch.no_grad()
def validate(
    objective: DocumentObjective, held_out: Mapping[str, list[Lesson]], processes: Processes
) -> dict[str, float]:
    """Means over texts: the losses and the share of answers that are right; without any adapter as "base", and with the
    next text's adapter as "other". Each for every kind of text, and as the mean of the kinds, which decides: what has
    forgotten one of them is not the best, however good it is at another."""
    found: dict[str, float] = {}
    objective.net.eval()
    for kind, lessons in held_out.items():
        for name, value in _of_kind(objective, lessons, processes).items():
            found[f"{kind}/{name}"] = value
            found[name] = found.get(name, 0.0) + value / len(held_out)
    objective.net.train()
    return found


def _of_kind(objective: DocumentObjective, lessons: list[Lesson], processes: Processes) -> dict[str, float]:
    sums: dict[str, float] = {}
    for first in processes.own(range(0, len(lessons), _AT_ONCE)):
        some = lessons[first : first + _AT_ONCE]
        asked = objective.asked(some)
        joined = objective.factors(asked)
        own = objective.of_questions(joined, asked.of)
        turned = objective.of_questions(joined, (asked.of + 1) % asked.texts)
        for name, factors in (("", own), ("base/", {}), ("other/", turned)):
            for term, value in objective._terms(*objective.answers(asked.batch, factors), asked).items():
                sums[name + term] = sums.get(name + term, 0.0) + float(value) * len(some)
    return {name: value / len(lessons) for name, value in processes.figures(sums).items()}


def _fingerprint(settings: DocumentHypernetSettings) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), default=str, sort_keys=True).encode())
    # What is made up may be made otherwise later.
    digest.update(repr(lessons_of(settings).of_step(0, settings.texts)).encode())
    files = [settings.data / f"{settings.name}.{split}.jsonl" for split in ("train", "validation")]
    others = [settings.data / f"{name}.train.jsonl" for name in settings.apart]
    for file in [*(files if settings.task == "passages" else []), *others]:
        digest.update(file.read_bytes())
    if settings.start is not None:
        digest.update((settings.start / "hypernet.safetensors").read_bytes())
    return digest.hexdigest()
