"""An adapter that learns pairs about one conversation after the other, and is measured on others about them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter import WEIGHTS_FILE, Adapter
from molora.chat import render
from molora.checks import check_fits
from molora.errors import ConfigError, NonFiniteError
from molora_training.attention import attending_causally
from molora_training.batches import plan_pass, plan_steps, rounded
from molora_training.captured import CapturedSteps
from molora_training.checkpoint import save_tensors
from molora_training.continual.steady import Steady
from molora_training.plum.pairs import NO, WORDINGS, YES, Pair
from molora_training.plum.segments import (
    ANSWER,
    OTHER,
    SegmentBatch,
    Segmented,
    SegmentLoss,
    SegmentWeights,
    padded,
    segmented,
)
from molora_training.schedule import warm_cosine

_CLIP_NORM = 1.0
_WARMUP = 0.1  # share of a conversation's steps
_AT_ONCE = 32  # questions that are answered in one batch
_ON_GPU = 8  # times as many: a small base leaves it idle
_AT_ONCE_ON_GPU = 1 << 14  # padded tokens of rows that are judged in one batch


@dataclass(frozen=True)
class Learning:
    """How a conversation is learnt.

    Args:
        learning_rate: its peak, of each conversation. epochs: passes over its pairs; of a conversation each has
            wordings and negatives of its own, for negatives that come again and again are learnt by heart.
        wordings: of each topic, open and closed ones each.
        pull: what the squared distance from the weights before the conversation costs, summed over all.
        weights: of the segments.
        rehearsed: topics of earlier conversations that are practised beside a new one; 0: none, and their names are
            not kept.
        rank: of an adapter that begins anew; its alpha is twice that.
        batch_tokens: padded tokens of a step.
        seed: of wordings, negatives and order.
    """

    learning_rate: float = 1e-3
    epochs: int = 5
    wordings: int = WORDINGS
    pull: float = 1e-3
    weights: SegmentWeights = field(default_factory=lambda: SegmentWeights(opening=1.0))
    rehearsed: int = 64
    rank: int = 8
    batch_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "wordings", "rank", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name in ("pull", "rehearsed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Measured:
    """On pairs: nats an answer token; of the closed questions the share that is answered right, where yes is right and
    where no is, None where there are none."""

    loss: float
    positives: float | None
    negatives: float | None

    @property
    def right(self) -> float:
        """The share of closed questions that are answered right, both kinds counting as much."""
        shares = [share for share in (self.positives, self.negatives) if share is not None]
        return sum(shares) / max(1, len(shares))


class Learner:
    """A PEFT adapter on a frozen base.

    Args:
        base: where it is to run; it is changed. tokenizer: its own.
        start: the adapter's folder to go on from.
        settings: how.
        base_name: as its users name it.

    Raises:
        AdapterError: the adapter cannot be read, or is not this base's.
    """

    def __init__(self, base: Any, tokenizer: Any, start: Path, settings: Learning, base_name: str) -> None:
        from peft import LoraConfig, PeftModel

        check_fits(Adapter.load(start), base, base_name)
        config = LoraConfig.from_pretrained(start)
        config.lora_dropout, config.inference_mode = 0.0, False
        self.tokenizer, self.settings, self.base_name = tokenizer, settings, base_name
        self.model: Any = PeftModel.from_pretrained(base, start, is_trainable=True, config=config).eval()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._before = [parameter.detach().clone() for parameter in self.parameters.values()]  # a conversation
        self._captured: CapturedSteps | None = None
        self.loss = SegmentLoss(base, settings.weights)
        self.pad_id = int(tokenizer.pad_token_id or 0)

    def learn(
        self,
        pairs: Sequence[Pair],
        on_step: Callable[[int, int], None] | None = None,
        steady: Steady | None = None,
        epochs: int | None = None,
        together: int = 1,
    ) -> int:
        """Some epochs over the pairs of one conversation.

        Args:
            pairs: of the conversation, of all epochs if ``epochs`` is 1.
            on_step: called before each step with the number of finished ones and that of all; an error of it ends the
                learning.
            steady: conversations that are to be answered as the base answers them.
            epochs: None: those of the settings.
            together: pairs that follow each other and stay in one batch, such as a question about what was discussed
                and the same about what was not: batches are of similar length, and those of one kind alone would have
                the adapter say the same to all.

        Returns:
            The number of steps.

        Raises:
            NonFiniteError: the loss or its gradient is not finite.
        """
        settings = self.settings
        rows = [self._row(pair) for pair in pairs]
        units = [range(first, min(first + together, len(rows))) for first in range(0, len(rows), together)]
        lengths = [max(_lengths(rows[unit.start : unit.stop])) for unit in units]
        plan = plan_steps(lengths, settings.batch_tokens // together, epochs or settings.epochs, settings.seed)
        steps = [[index for place in some for index in units[place]] for some in plan]
        own = list(self.parameters.values())
        with torch.no_grad():
            for then, now in zip(self._before, own, strict=True):
                then.copy_(now)
        if steady is not None:
            steady.prepare(self.model)
        optimizer = torch.optim.AdamW(own, settings.learning_rate, weight_decay=0.0)
        with self._stepping(max(_lengths(rows)), steady) as step:
            for number, indices in enumerate(steps):
                if on_step is not None:
                    on_step(number, len(steps))
                for group in optimizer.param_groups:
                    group["lr"] = warm_cosine(number, len(steps), _WARMUP, settings.learning_rate)
                loss = step(padded([rows[index] for index in indices], self.pad_id, self._device))
                both = torch.stack([loss, nn.utils.clip_grad_norm_(own, _CLIP_NORM)])
                if not all(math.isfinite(value) for value in both.tolist()):
                    raise NonFiniteError(
                        f"The loss became {both[0]:.4g} at step {number + 1} and its gradient {both[1]:.4g}: nothing "
                        "is kept of it; take a lower learning rate."
                    )
                optimizer.step()
        return len(steps)

    @torch.no_grad()
    def measure(self, pairs: Sequence[Pair]) -> Measured:
        """What the adapter makes of pairs, of which some are closed ones of either kind."""
        rows = [self._row(pair) for pair in pairs]
        total, count = 0.0, 0
        for each, segments, _ in self._each(rows):
            total += float(each.sum())
            count += int((segments == ANSWER).sum())
        closed = [pair for pair in pairs if pair.closed]
        yes = self.says_yes([pair.question for pair in closed])
        right = {
            sign: [said == sign for said, pair in zip(yes, closed, strict=True) if pair.discussed == sign]
            for sign in (True, False)
        }
        shares = {sign: sum(each) / len(each) if each else None for sign, each in right.items()}
        return Measured(total / count, shares[True], shares[False])

    @torch.no_grad()
    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        """What it says to each, greedily, in ``tokens`` at most."""
        said: list[str] = []
        at_once = _AT_ONCE * (_ON_GPU if self._device.type == "cuda" else 1)
        for start in range(0, len(questions), at_once):
            asked = [
                render(self.tokenizer, [{"role": "user", "content": one}], add_generation_prompt=True)
                for one in questions[start : start + at_once]
            ]
            inputs = self.tokenizer(
                asked, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            ids, mask = (inputs[name].to(self._device) for name in ("input_ids", "attention_mask"))
            with self._mixed():
                found = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=self.pad_id
                )
            said += self.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        return said

    @torch.no_grad()
    def says_yes(self, prompts: Sequence[str]) -> list[bool]:
        """Of each prompt whether an answer is likelier to begin with yes than with no."""
        nats = {word: self._nats([self._begun(prompt, word) for prompt in prompts]) for word in (YES, NO)}
        return [yes < no for yes, no in zip(nats[YES], nats[NO], strict=True)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base without the adapter."""
        with self.model.disable_adapter():
            yield

    @torch.no_grad()
    def settle(self) -> None:
        """Rounds the adapter to bfloat16, as which it is kept."""
        for parameter in self.parameters.values():
            parameter.copy_(parameter.to(torch.bfloat16))

    def write(self, folder: Path) -> None:
        """Writes an ordinary PEFT folder of bfloat16 weights, and nothing else."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True)
        config = self.model.peft_config["default"]
        config.base_model_name_or_path, config.inference_mode = self.base_name, True
        if not isinstance(config.target_modules, str):  # a sorted list makes equal runs equal files
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)
        trained = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
        save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})

    @contextmanager
    def _stepping(self, longest: int, steady: Steady | None) -> Iterator[Callable[[SegmentBatch], Tensor]]:
        """Gives what puts the gradients of a batch in place and tells its loss. On a GPU it is captured, and serves all
        conversations: a small base's step is thousands of launches, which take the host ten times as long."""

        def plainly(batch: SegmentBatch) -> Tensor:
            self.model.zero_grad(set_to_none=True)
            loss = self._objective(batch, steady)["loss"]
            loss.backward()
            return loss.detach()

        if self._device.type != "cuda" or steady is not None:
            yield plainly
            return
        with attending_causally(self.model.get_base_model(), rounded(longest)) as able:
            if able and self._captured is None:
                tokens = self.settings.batch_tokens
                self._captured = CapturedSteps(self._objective, self.parameters.values(), tokens)
            captured = self._captured
            yield plainly if captured is None or not able else lambda batch: captured(batch)["loss"]

    def _objective(self, batch: SegmentBatch, steady: Steady | None = None) -> dict[str, Tensor]:
        with self._mixed():
            loss = self.loss(self.model, batch)
        if self.settings.pull:
            loss = loss + self.settings.pull * pulled(list(self.parameters.values()), self._before)
        if steady is not None:
            with self._mixed():
                loss = loss + steady.drift(self.model)
        return {"loss": loss}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _mixed(self) -> AbstractContextManager[Any]:
        cuda = self._device.type == "cuda" and self.model.dtype == torch.bfloat16
        return torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def _row(self, pair: Pair) -> Segmented:
        turns = [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
        return segmented(turns, self.tokenizer)

    def _begun(self, prompt: str, word: str) -> Segmented:
        """A prompt and the first word of an answer to it, the word as ``ANSWER``."""
        asked = render(self.tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        before, said = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, word))
        return Segmented(torch.tensor([*before, *said]), torch.tensor([OTHER] * len(before) + [ANSWER] * len(said)))

    def _nats(self, rows: Sequence[Segmented]) -> list[float]:
        """Of each row's answer, summed over its tokens."""
        found = [0.0] * len(rows)
        for each, _, places in self._each(rows):
            for place, value in zip(places, each.sum(1).tolist(), strict=True):
                found[place] = value
        return found

    def _each(self, rows: Sequence[Segmented]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """In batches: nats of answers' tokens and all tokens' segments, both [B, T - 1], and which rows they are."""
        at_once = _AT_ONCE_ON_GPU if self._device.type == "cuda" else self.settings.batch_tokens
        for places in plan_pass(_lengths(rows), at_once):
            with self._mixed():
                batch = padded([rows[place] for place in places], self.pad_id, self._device)
                each, segments = self.loss.each(self.model, batch)
            yield each, segments, places


def pulled(own: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """The squared distance of weights from what they were, summed over all; shape []."""
    return torch.stack([(now - then).square().sum() for now, then in zip(own, before, strict=True)]).sum()


def _lengths(rows: Sequence[Segmented]) -> list[int]:
    return [row.input_ids.numel() for row in rows]
