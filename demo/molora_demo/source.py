"""What the page asks for answers: a model in this process. A server is asked the same way, by ``remote``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from molora.chat import render
from molora.errors import MoLoRAError
from molora.selection import Selection
from molora.stack import StackLayer
from molora_demo.render import Token


@dataclass(frozen=True)
class Settings:
    """How an answer is generated; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Turn:
    """A finished pair: plain text for the model, HTML for the page."""

    prompt: str
    answer: str
    html: str


@dataclass(frozen=True)
class Numbers:
    """What is under way, and what lies where.

    running, waiting: answers. rows: how many can run at once, None: one.
    places: by place ("in the model", ...) and layer how many adapters lie there.
    bytes: of what is told by name.
    counts: any others, since the start.
    """

    running: int
    waiting: int
    rows: int | None = None
    places: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


class Source(Protocol):
    """Answers questions under a selection."""

    name: str
    at_once: int
    model: Any  # the `MoLoRAModel` of this process; None: it is elsewhere

    @property
    def layers(self) -> Sequence[StackLayer]: ...
    @property
    def has_router(self) -> bool: ...

    def catch_up(self) -> list[str]:
        """Brings in what is new since the last answer and names it."""
        ...

    def ask(self, turns: Sequence[Turn], prompt: str, selection: Selection, settings: Settings) -> Iterator[Token]:
        """The answer's tokens, to be closed by who stops early."""
        ...

    def numbers(self) -> Numbers: ...


class LocalSource:
    """A model in this process, which answers one question at a time.

    Args:
        model: a `MoLoRAModel`; of it are needed ``stack``, ``router``, ``stream``, ``tokenizer`` and ``config``.
        catch_up: called before each answer, brings in what is new and names it.
    """

    at_once = 1

    def __init__(self, model: Any, catch_up: Callable[[], list[str]] = list) -> None:
        self.model = model
        self.name = str(getattr(model, "base_name", "the base model"))
        self.catch_up = catch_up

    @property
    def layers(self) -> Sequence[StackLayer]:
        layers: Sequence[StackLayer] = self.model.stack.layers
        return layers

    @property
    def has_router(self) -> bool:
        return self.model.router is not None

    def ask(self, turns: Sequence[Turn], prompt: str, selection: Selection, settings: Settings) -> Iterator[Token]:
        """
        Raises:
            MoLoRAError: the question alone is too long, or the selection does not fit the stack.
        """
        room = self.model.config.max_position_embeddings - settings.max_new_tokens
        messages = fitting_messages(turns, prompt, room, self._count)
        sampled: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sampled["temperature"] = settings.temperature
        tokens: Iterator[Token] = self.model.stream(
            messages, selection=selection, max_new_tokens=settings.max_new_tokens, **sampled
        )
        return tokens

    def numbers(self) -> Numbers:
        adapters = dict(getattr(self.model, "adapters", {}))
        there = {layer.name: len(layer.adapters) for layer in self.layers}
        taken = {
            layer.name: sum(_bytes(adapter) for label, adapter in adapters.items() if label.split("/")[0] == layer.name)
            for layer in self.layers
        }
        return Numbers(0, 0, None, {"in the model": there}, {f"{name} adapters": size for name, size in taken.items()})

    def _count(self, messages: list[dict[str, str]]) -> int:
        text = render(self.model.tokenizer, messages, add_generation_prompt=True)
        return len(self.model.tokenizer(text, add_special_tokens=False).input_ids)


def _bytes(adapter: Any) -> int:
    return sum(tensor.nbytes for weights in adapter.modules.values() for tensor in weights.kept)


def messages_of(turns: Sequence[Turn], prompt: str) -> list[dict[str, str]]:
    """The conversation with ``prompt`` at its end."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.answer})
    return [*messages, {"role": "user", "content": prompt}]


def fitting_messages(
    turns: Sequence[Turn], prompt: str, room: int, count: Callable[[list[dict[str, str]]], int]
) -> list[dict[str, str]]:
    """The conversation with ``prompt`` at its end, without as many of the oldest pairs as it takes to fit.

    Args:
        room: the most tokens that the prompt may have.
        count: the number of tokens of messages rendered for generation.

    Raises:
        MoLoRAError: ``prompt`` alone does not fit.
    """
    for start in range(len(turns) + 1):
        messages = messages_of(turns[start:], prompt)
        if (tokens := count(messages)) <= room:
            return messages
    raise MoLoRAError(
        f"Your message has {tokens} tokens and this model can read {max(room, 0)} with the present settings. "
        f"Shorten it, or lower the number of new tokens."
    )
