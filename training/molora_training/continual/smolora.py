"""Blocks of one adapter, found twice by the question: by what it is about, and by what is asked for in the end.

This is the separable mixture of low-rank adaptation (SMoLoRA, arXiv 2411.13949) for text. Each linear module has two
sets of small LoRA blocks; of each set one acts on a question, and what the two give is fused for each token. Set 0 is
found by the content, which in the paper is an image and here the mean over the question's tokens, set 1 by the
instruction, which there is a sentence's embedding and here the state of the question's last token.

In the authors' code the choice has no gradient, so their routers stay the random projections that they begin as, and
they are frozen from the second task on; here they are random, fixed and the same for all modules from the start. Their
content router takes the mean over whatever is passed, at decoding a single token; here the base without blocks reads a
question once, and what is chosen then holds until the answer ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from molora.base import load_base
from molora.checks import linear_sizes
from molora.errors import DataError, NonFiniteError
from molora_training.adapter_run import answer_count
from molora_training.batches import plan_pass, plan_steps
from molora_training.continual.questions import represented
from molora_training.continual.separable import Choice, Gates, SeparableLinear, block_rank
from molora_training.continual.update import UpdateSettings, as_examples
from molora_training.data import IGNORED, Encoded, collate, encode_within
from molora_training.schedule import warm_cosine
from molora_training.token_losses import TokenLosses

WARMUP, CLIP_NORM, VALIDATE_EVERY = 0.05, 1.0, 10  # as an update trains an adapter
Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Chosen:
    """Conversations and the blocks of each: [rows, 2]."""

    rows: Sequence[Encoded]
    blocks: torch.Tensor


class SMoLora:
    """A base whose blocks go from task to task, on from where they were; no text is kept.

    Args:
        how: of each task's training; its seed is also that of gates and blocks. ``data`` of it is not read.
        base: the base's name.
        rank: of all blocks of a module together, of which a quarter acts on a question.
    """

    def __init__(self, how: UpdateSettings, base: str, rank: int) -> None:
        self.how, self.rank, each = how, rank, block_rank(rank)
        model, self.tokenizer = load_base(base, dtype=getattr(torch, how.chosen_dtype))
        self.base: Any = model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
        self.token_losses, self.choice = TokenLosses(self.base), Choice()
        self.gates = Gates(self.base.config.hidden_size, how.seed)
        self.parameters = self._wrap(each)

    def learn(self, task: str, new: Sequence[Row], apart: Sequence[Row]) -> None:
        """Trains the blocks that the questions of ``new`` choose; those of the step that does best on ``apart`` stay.

        Raises:
            DataError: no conversation has an answer within ``max_length``. NonFiniteError: the loss is not finite.
        """
        rows, held_out = self._encoded(task, new), self._encoded(task, apart)
        asked = self._asked(rows)
        self.gates.see(asked)
        self._train(_Chosen(rows, self.gates(asked)), _Chosen(held_out, self.gates(self._asked(held_out))))

    def answering(self, questions: torch.Tensor) -> Callable[..., Any]:
        """What answers a batch of questions, of which ``questions`` [B, 2, hidden] are the representations."""
        return partial(self._run, self.gates(questions))

    @property
    def head(self) -> nn.Module:
        """The output head."""
        found: nn.Module = self.base.get_output_embeddings()
        return found

    @property
    def bytes(self) -> int:
        """What is kept beside the blocks."""
        return self.gates.bytes

    def _wrap(self, rank: int) -> list[nn.Parameter]:
        """Puts blocks into all linear modules but the output head; gives what learns."""
        chance, head = torch.Generator().manual_seed(self.how.seed), self.base.get_output_embeddings()
        found: list[nn.Parameter] = []
        for name in linear_sizes(self.base):
            module = self.base.get_submodule(name)
            if module is not head:
                wrapped = SeparableLinear(module, rank, self.choice, chance).to(self.base.device)
                self.base.set_submodule(name, wrapped)
                found += [wrapped.a, wrapped.b, wrapped.f]
        return found

    def _run(self, blocks: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with self.choice.of(blocks.to(self.base.device)):
            return self.base(*args, **kwargs)

    def _encoded(self, task: str, rows: Sequence[Row]) -> list[Encoded]:
        fitting = encode_within(as_examples(rows, task), self.tokenizer, self.how.max_length, [task])
        found = [row for row in fitting if answer_count(row)]
        if not found:
            raise DataError(f"No conversation of {task} has an answer within {self.how.max_length} tokens.")
        return found

    def _asked(self, rows: Sequence[Encoded]) -> torch.Tensor:
        return represented(self.base, rows, 0, self.how.batch_tokens)

    def _train(self, new: _Chosen, apart: _Chosen) -> None:
        how = self.how
        steps = plan_steps([row.input_ids.numel() for row in new.rows], how.batch_tokens, how.epochs, how.seed)
        optimizer = torch.optim.AdamW(self.parameters, lr=how.learning_rate, weight_decay=0.0)
        best, kept = self._validate(apart), self._copied()
        for step, indices in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = warm_cosine(step, len(steps), WARMUP, how.learning_rate)
            optimizer.zero_grad()
            loss = self._summed_loss(new, indices) / sum(answer_count(new.rows[index]) for index in indices)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            if not (loss + norm).isfinite():
                raise NonFiniteError(
                    f"The loss became {loss.item()} and the gradient's norm {norm.item()} at step {step + 1}; take a "
                    f"lower learning_rate."
                )
            optimizer.step()
            if (step + 1) % VALIDATE_EVERY == 0 or step + 1 == len(steps):
                found = self._validate(apart)
                if found < best:
                    best, kept = found, self._copied()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)

    def _copied(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def _validate(self, apart: _Chosen) -> float:
        """The mean loss of an answer's token."""
        batches = plan_pass([row.input_ids.numel() for row in apart.rows], self.how.batch_tokens)
        total = sum(float(self._summed_loss(apart, indices)) for indices in batches)
        return total / sum(answer_count(row) for row in apart.rows)

    def _summed_loss(self, part: _Chosen, indices: Sequence[int]) -> torch.Tensor:
        """Of the answers' tokens, float32, shape []; computed in bfloat16 where the base is and a GPU does it, as an
        adapter's is."""
        kind, blocks = self.base.device.type, part.blocks[list(indices)]
        batch = collate([part.rows[index] for index in indices], 0).to(self.base.device)
        mixed = kind == "cuda" and self.how.chosen_dtype == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            return self.token_losses(
                lambda: self._run(
                    blocks, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ),
                nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED),
            ).sum()
