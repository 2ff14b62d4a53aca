"""An adapter of its own for each task: nothing that was learnt changes any more, and no text is kept.

It is found by its row of the router, as `molora update domain NAME --new 8` and `molora update router` have it (rows
before are protected by the router's samples, 128 tokens' features of each), or by its key, as a keyed layer has it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.keys import LayerKeys
from molora_training import router
from molora_training.continual.growth import blank
from molora_training.continual.method import Growing
from molora_training.continual.questions import MEAN, represented
from molora_training.continual.router_update import RouterUpdateSettings, go_on
from molora_training.continual.update import UpdateSettings, as_examples, learn, write_chats
from molora_training.data import encode_within
from molora_training.router_settings import RouterTrainSettings

LAYER = "task"
Row = Mapping[str, Any]


class Apart:
    """A stack that grows by an adapter with each task.

    Args:
        how: of each adapter's training; ``data`` of it is not read.
        base: the base's name.
        folder: where the adapters lie.
        routed: found by rows of a router, which is trained on the first task; else by keys.
    """

    def __init__(self, how: UpdateSettings, base: str, folder: Path, routed: bool) -> None:
        self.how, self.base, self.folder, self.routed = how, base, folder, routed
        self.keys = LayerKeys()
        self.model: Any = None

    def learn(self, task: str, new: Sequence[Row], apart: Sequence[Row]) -> None:
        """Trains the task's adapter on ``new``, validated by ``apart``, and lets it be found."""
        work = self.folder / task
        text = work / "text"
        text.mkdir(parents=True)
        for split, rows in (("train", new), ("validation", apart)):
            write_chats(work / f"{split}.jsonl", rows, task)
            write_chats(text / f"{task}.{split}.jsonl", rows, task)
        blank(self.base, Growing.ranks, work / "blank", self.how.seed)
        _, adapter, _ = learn(self.how, self.base, work / "blank", work / "none", new, work)
        if self.model is None:
            self.model = self._first(task, adapter, text, work)
        else:
            before = [f"{LAYER}/{name}" for name in self.model.stack[LAYER].adapters]
            self.model.add_adapter(LAYER, task, adapter)
            if self.routed:
                self.model.set_router(go_on(self.model, RouterUpdateSettings(text, text), [task], before)[0])
        if not self.routed:
            asked = encode_within(as_examples(new, task), self.model.tokenizer, self.how.max_length, [task])
            self.keys.put(task, represented(self.model.base, asked, 0, self.how.batch_tokens)[:, MEAN])

    def answering(self, questions: torch.Tensor) -> Callable[..., Any]:
        """What answers a batch of questions, of which ``questions`` [n, 2, hidden] are the representations."""
        if self.routed:
            return partial(self.model, selection={LAYER: "auto"})
        names = self.keys.nearest(questions[:, MEAN], list(self.keys.questions))
        return partial(self.model, selection=[{LAYER: name} for name in names])

    def _first(self, task: str, adapter: Path, text: Path, work: Path) -> MoLoRAModel:
        stack = Stack([StackLayer(LAYER, {task: adapter}, default="auto" if self.routed else None)])
        dtype = getattr(torch, self.how.chosen_dtype)
        if not self.routed:
            model = MoLoRAModel.from_base(self.base, stack, dtype=dtype)
        else:
            stack.save(work / "stack.yaml")
            training = RouterTrainSettings(
                work / "stack.yaml", work / "routed", text, self.base, router=RouterConfig(), epochs=1,
                batch_tokens=self.how.batch_tokens, seed=self.how.seed, dtype="float32",
            )  # fmt: skip
            router.train(training, resume=False)
            model = MoLoRAModel.from_pretrained(work / "routed", dtype=dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @property
    def head(self) -> nn.Module:
        """The output head."""
        found: nn.Module = self.model.base.get_output_embeddings()
        return found

    @property
    def bytes(self) -> int:
        """What is kept beside adapters and rows: the router's samples, or the keys."""
        if not self.routed:
            return sum(questions.nbytes for questions in self.keys.questions.values())
        parts = () if self.model is None else self.model.router.parts
        return sum(part.samples.features.nbytes + part.samples.rows.nbytes for part in parts)

    @property
    def rank(self) -> int:
        """Of all adapters together."""
        return Growing.ranks * (0 if self.model is None else len(self.model.stack[LAYER].adapters))
