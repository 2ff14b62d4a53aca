"""What a document network learns by: to make the base answer, without the text, as it answers with it.

Context distillation of arXiv 2602.15902: minus the sum of p log q over the teacher's likeliest tokens, a mean over an
answer's tokens, then over a text's questions, then over texts, and an L1 term of the factors. Beside it, or instead,
the cross-entropy of the answer that is known. Ours: what is asked of another text, or in a conversation about something
else, is answered as by the base alone.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError, DataError
from molora.personalize.document_net import DocumentNet, by_module
from molora.personalize.documents import chunks
from molora.personalize.generated import generated
from molora.personalize.internalize import read_as, states_of
from molora_training.data import IGNORED, Batch, Encoded, collate, encode
from molora_training.data.lessons import Lesson
from molora_training.evaluate import seeing

LIKELIEST = 16  # tokens of the teacher's that are learnt from


@dataclass(frozen=True)
class DocumentLoss:
    """Weights. gold: cross-entropy of the known answer. distil: of the teacher's. l1: of the factors' mean size. keep:
    Kullback-Leibler divergence from the base's answer about the next text of the step, which needs two of them. apart:
    the same in a conversation that has nothing to do with any text. sparse: ||A|| ||B|| of a chunk in a module, the
    mean: a group lasso, which leaves most chunks nothing to say."""

    gold: float = 1.0
    distil: float = 0.0
    l1: float = 0.1
    keep: float = 0.0
    apart: float = 0.0
    sparse: float = 0.0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or not self.gold + self.distil:
            names = [one.name for one in fields(self)]
            raise ConfigError(f"None of {', '.join(names)} may be below 0, nor gold and distil both 0.")


@dataclass(frozen=True)
class Asked:
    """Lessons as the base reads them.

    ids [C, N], mask [C, N]: chunks of all texts. owners [C]: their texts. batch: the questions with their answers,
    without the texts. of [Q]: the text that each question is about. texts: how many there are; beside: of them the last
    ones that are there for their adapters alone.
    """

    ids: Tensor
    mask: Tensor
    owners: Tensor
    batch: Batch
    of: Tensor
    texts: int
    beside: int = 0


class DocumentObjective:
    """Losses of lessons.

    Args:
        base: frozen. tokenizer: its own. net: what learns.
        weights: of the terms.
    """

    def __init__(self, base: Any, tokenizer: Any, net: DocumentNet, weights: DocumentLoss) -> None:
        self.base, self.tokenizer, self.net, self.weights = base, tokenizer, net, weights
        self.head: nn.Module = base.get_output_embeddings()

    def __call__(
        self, lessons: Sequence[Lesson], own: range | None = None, apart: Sequence[Encoded] = ()
    ) -> dict[str, Tensor]:
        """Scalars: loss and its terms; the share of answers whose every token is the likeliest one as "right".

        Args:
            lessons: of a step.
            own: the places of those that are learnt from here, elsewhere the others: the terms are then their parts of
                the step's. None: all.
            apart: a conversation about something else for each of them, if the weights have them matter.
        """
        part = range(len(lessons)) if own is None else own
        mine = lessons[part.start : part.stop]
        beside = [lessons[part.stop % len(lessons)]] if self.weights.keep and len(mine) < len(lessons) else []
        asked = self.asked([*mine, *beside], len(beside))
        made = self.made(asked)
        joined = self.net.joined(made, asked.owners, asked.texts)
        answered = asked.batch.labels[:, 1:] != IGNORED
        wanted = asked.batch.labels[:, 1:][answered]
        if self.weights.keep:  # of both texts at once: a small base leaves a GPU idle between two calls
            of = torch.cat([asked.of, (asked.of + 1) % asked.texts])
            both, _ = self.answers(_twice(asked.batch), self.of_questions(joined, of))
            logits, other = both.split(len(wanted))
        else:
            logits, _ = self.answers(asked.batch, self.of_questions(joined, asked.of))
        terms = self._terms(logits, answered, asked)
        if self.weights.distil:
            with torch.no_grad():
                teacher, same = self.answers(self.with_texts(mine), {})
            if int(same.sum()) != len(wanted):
                raise DataError("An answer has other tokens after its text than without it.")
            likely, tokens = teacher.softmax(-1).topk(LIKELIEST)
            each = -(likely * logits.log_softmax(-1).gather(1, tokens)).sum(-1)
            terms["distil"] = self._mean(each, answered, asked)
        if self.weights.keep:
            terms["keep"] = self._mean(self._kept(other, asked.batch), answered, asked)
        if self.weights.apart:
            terms["apart"] = self._apart(apart[part.start : part.stop], joined)
        if self.weights.sparse:  # not of A or B alone: the other one could grow for it
            learnt = int((asked.owners < len(mine)).sum()) if beside else len(asked.owners)
            sizes = [A[:learnt].flatten(2).norm(dim=2) * B[:learnt].flatten(2).norm(dim=2) for A, B in made.values()]
            terms["sparse"] = torch.stack(sizes).mean()
        factors = [factor[: len(mine)] for pair in joined.values() for factor in pair]
        terms["l1"] = torch.stack([factor.abs().mean() for factor in factors]).mean()
        if len(mine) < len(lessons):
            shares = self._shares(lessons, part, [*mine, *beside])
            terms = {name: value * shares[name] for name, value in terms.items()}
        weighted = [
            getattr(self.weights, one.name) * terms[one.name] for one in fields(DocumentLoss) if one.name in terms
        ]
        return {**terms, "loss": torch.stack(weighted).sum()}

    def _shares(self, lessons: Sequence[Lesson], own: range, read: Sequence[Lesson]) -> dict[str, float]:
        """By term, what its mean over a part of a step counts for; read: the part, and what is beside it."""
        texts = len(own) / len(lessons)
        asked = [len(lesson.questions) for lesson in lessons]
        size = self.net.config.chunk
        parts = [len(chunks(lesson.text, self.tokenizer, size)) for lesson in lessons]
        # Texts of fewer chunks are filled up with ranks of zeros, which are in the mean; one rank more is learned.
        most = max(len(chunks(lesson.text, self.tokenizer, size)) for lesson in read)
        return {
            **dict.fromkeys(("gold", "distil", "keep", "apart"), texts),
            "right": sum(asked[place] for place in own) / sum(asked),
            "sparse": sum(parts[place] for place in own) / sum(parts),
            "l1": texts * (1 + most) / (1 + max(parts)),
        }

    def asked(self, lessons: Sequence[Lesson], beside: int = 0) -> Asked:
        """beside: of the last ones, which are read and not asked about."""
        parts = [chunks(lesson.text, self.tokenizer, self.net.config.chunk) for lesson in lessons]
        device = self.base.device
        ids, mask = read_as(self.tokenizer, [part for some in parts for part in some], device)
        owners = torch.tensor([text for text, some in enumerate(parts) for _ in some], device=device)
        learnt = lessons[: len(lessons) - beside]
        rows = [self._row(question, answer) for lesson in learnt for question, answer in lesson.questions]
        of = torch.tensor([text for text, lesson in enumerate(learnt) for _ in lesson.questions], device=device)
        return Asked(ids, mask, owners, collate(rows, self._pad).to(device), of, len(lessons), beside)

    def with_texts(self, lessons: Sequence[Lesson]) -> Batch:
        """The questions with the texts before them: what the teacher sees."""
        rows = [self._row(f"{lesson.text}\n\n{q}", answer) for lesson in lessons for q, answer in lesson.questions]
        return collate(rows, self._pad).to(self.base.device)

    def factors(self, asked: Asked) -> dict[str, Any]:
        """The texts' adapters, by the end of a module's name: A [texts, layers, R, in], B [texts, layers, out, R]."""
        return self.net.joined(self.made(asked), asked.owners, asked.texts)

    def made(self, asked: Asked) -> dict[str, tuple[Tensor, Tensor]]:
        """The chunks' own adapters, see :meth:`DocumentNet.forward`."""
        return self.net(states_of(self.base, asked.ids, asked.mask, self.net.config.exit), asked.mask)

    def of_questions(self, joined: dict[str, Any], of: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By the base's module names, a row for each question."""
        return {name: (A[of], B[of]) for name, (A, B) in by_module(self.base, joined).items()}

    def answers(self, batch: Batch, factors: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Logits [answer tokens, vocabulary] float32, and where they are: bool [Q, T - 1]."""
        answered = batch.labels[:, 1:] != IGNORED
        with generated(self.base, factors), seeing(self.head, answered):
            found = self.base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return found.float(), answered

    def _apart(self, rows: Sequence[Encoded], joined: dict[str, Any]) -> Tensor:
        """The mean over conversations, the first under the first text's adapter and so on."""
        batch = collate(rows, self._pad).to(self.base.device)
        with_text, answered = self.answers(
            batch, self.of_questions(joined, torch.arange(len(rows), device=self.base.device))
        )
        by_row = torch.zeros(len(rows), device=answered.device)
        by_row = by_row.index_add(0, answered.nonzero()[:, 0], self._kept(with_text, batch))
        return (by_row / answered.sum(1)).mean()

    def _kept(self, logits: Tensor, batch: Batch) -> Tensor:
        """How far each answer's token is from what the base says without an adapter."""
        with torch.no_grad():
            alone, _ = self.answers(batch, {})
        divergence = nn.functional.kl_div(
            logits.log_softmax(-1), alone.log_softmax(-1), reduction="none", log_target=True
        )
        return divergence.sum(-1)

    def _terms(self, logits: Tensor, answered: Tensor, asked: Asked) -> dict[str, Tensor]:
        wanted = asked.batch.labels[:, 1:][answered]
        each = nn.functional.cross_entropy(logits, wanted, reduction="none")
        row = answered.nonzero()[:, 0]
        wrong = torch.zeros(len(answered), device=row.device).index_add(0, row, (logits.argmax(-1) != wanted).float())
        return {"gold": self._mean(each, answered, asked), "right": (wrong == 0).float().mean()}

    def _mean(self, each: Tensor, answered: Tensor, asked: Asked) -> Tensor:
        """Over an answer's tokens, then a text's questions, then texts."""
        row = answered.nonzero()[:, 0]
        tokens = answered.sum(1).to(each)
        by_question = torch.zeros(len(answered), device=each.device).index_add(0, row, each) / tokens
        asked_of = torch.bincount(asked.of, minlength=asked.texts).to(each)
        return (by_question / asked_of[asked.of]).sum() / (asked.texts - asked.beside)

    def _row(self, question: str, answer: str) -> Encoded:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return encode(messages, self.tokenizer, ["text"], ["text"])

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


def _twice(batch: Batch) -> Batch:
    return Batch(**{name: torch.cat([rows, rows]) for name, rows in vars(batch).items()})
