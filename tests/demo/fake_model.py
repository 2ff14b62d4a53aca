"""A stand-in for `MoLoRAModel` with the parts that the demo uses: no weights, scripted answers, real selections."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from molora.errors import MoLoRAError
from molora.selection import candidates, resolve
from molora.stack import AUTO, SlotTable, Stack, StackLayer

ENDLESS = "count forever"
BROKEN = "break <now>"
HISTORY = "what did I say?"

# Stretches of one answer and the domain that the pretended router gives each.
SCRIPT = (
    ("The dose is the weight times the dose per kilogram:", "medicine"),
    (" 20 kg × 15 mg/kg = 300 mg.", "math"),
    (" It may be given again after six hours, and no more than four times a day.", "medicine"),
    ("\n\nIn Python, that is a single product:", None),
    ("\n\ndef dose(weight_kg, mg_per_kg=15):\n    return weight_kg * mg_per_kg", "code"),
    ("\n\nCalling dose(20) returns", "code"),
    (" 300, as computed above.", "math"),
    (" A package leaflet binds the seller, not the reader.", "law"),
)


@dataclass(frozen=True)
class FakeToken:
    token_id: int
    text: str
    route: list[tuple[str, str | None, float]]


class FakeTokenizer:
    """Words are tokens; the format is ChatML."""

    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {"<|im_start|>": 1, "<|im_end|>": 2}

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(range(len(words(text)))))


class FakeModel:
    """Args: delay_s: how long each token takes. positions: the length of its context."""

    def __init__(self, delay_s: float = 0.0, positions: int = 8192) -> None:
        domains = {"math": "m", "code": "c", "medicine": "d", "law": "l"}
        self.stack = Stack(
            [
                StackLayer("personality", {"sage": "s", "pirate": "p"}, default=None),
                StackLayer("domain", domains),
                StackLayer("user", {"ada": "a", "grace": "g"}, shared=True),
            ]
        )
        self.router = object()
        self.tokenizer = FakeTokenizer()
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.delay_s = delay_s
        self.calls: list[dict[str, Any]] = []
        self.closed = 0
        self._slots = SlotTable()
        for name in self.stack.names:
            self._slots.take(name)

    def stream(self, messages: list[dict[str, str]], selection: Any = None, **kwargs: Any) -> Iterator[FakeToken]:
        resolve(selection, self.stack, candidates(self.stack, self._slots), has_router=True)
        self.calls.append({"messages": messages, "selection": selection, **kwargs})
        return self._tokens(messages, selection, kwargs["max_new_tokens"])

    def _tokens(self, messages: list[dict[str, str]], selection: Any, most: int) -> Iterator[FakeToken]:
        prompt = messages[-1]["content"]
        script: list[tuple[str, str | None]] = list(SCRIPT)
        if prompt == ENDLESS:
            script = [(" tick", "math")] * 10_000
        if prompt == HISTORY:
            script = [(" | ".join(message["content"] for message in messages[:-1]) or "nothing", "code")]
        try:
            pieces = [(word, domain) for text, domain in script for word in words(text)]
            for number, (word, domain) in enumerate(pieces[:most]):
                time.sleep(self.delay_s)
                if prompt == BROKEN and number == 3:
                    raise MoLoRAError("The adapter <b>math</b> is gone: add it again.")
                yield FakeToken(number, word, list(self._route(domain, selection, number)))
        finally:
            self.closed += 1

    def _route(self, domain: str | None, selection: Any, number: int) -> Iterator[tuple[str, str | None, float]]:
        for layer in self.stack.layers:
            choice = selection.get(layer.name, layer.default)
            if choice == AUTO or isinstance(choice, list):
                allowed = layer.adapters if choice == AUTO else choice
                yield layer.name, domain if domain in allowed else None, 1.0 if number % 7 else 0.85
            elif isinstance(choice, dict):
                yield from ((layer.name, name, weight) for name, weight in choice.items())
            else:
                yield layer.name, choice, 1.0


def words(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)
