"""A soup from a folder of conversations: settings, training, and what it brought on text that was held out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from molora.adapter import Adapter
from molora.base import DEFAULT_BASE, load_base
from molora.errors import ConfigError, DataError
from molora.factors import Factors, concatenated, of_adapter
from molora_training.data import Encoded, encode_within, read_conversations
from molora_training.report import write_report
from molora_training.soup import train_soup
from molora_training.speaker import Speaker

METRICS = "metrics.json"
_BASE, _EVEN, _SOUP = "base", "even weights", "soup"
_OTHERS = {_BASE, _EVEN, _SOUP}  # whose losses stand beside the adapters'


@dataclass(frozen=True)
class SoupSettings:
    """What is put together, and from what text the weights are learnt.

    Args:
        adapters: name -> PEFT folder, two or more of one base.
        train, validation: JSON Lines of conversations, of all that the soup is to do.
        out: folder of the result.
        base: of the adapters.
        steps, learning_rate, batch_tokens, seed: of the training.
        max_length: tokens; longer conversations are left out.
        dtype: of the base.
    """

    adapters: dict[str, Path]
    train: Path
    validation: Path
    out: Path
    base: str = DEFAULT_BASE
    steps: int = 100
    learning_rate: float = 1e-2
    batch_tokens: int = 4096
    max_length: int = 1024
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16")

    def __post_init__(self) -> None:
        taken = _OTHERS & self.adapters.keys()
        if taken:
            raise ConfigError(f"An adapter cannot be called {min(taken)!r} here: metrics.json has that beside it.")
        if self.out.exists():
            raise ConfigError(f"{self.out} is there already: nothing was trained. Choose another folder.")


def run(settings: SoupSettings, command: str | None = None) -> dict[str, Any]:
    """Trains and writes the soup; returns what stands in its metrics.json.

    Raises:
        ConfigError, AdapterError, NonFiniteError: as of :func:`molora_training.soup.train_soup`. DataError: a file is
        not there, or holds no conversation that is short enough.
    """
    started = time.monotonic()
    base, tokenizer = load_base(settings.base, dtype=getattr(torch, settings.dtype))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = {name: _rows(file, tokenizer, settings) for name, file in _files(settings).items()}
    train_soup(
        base, settings.adapters, rows["train"], settings.out, tokenizer.pad_token_id or 0,
        steps=settings.steps, learning_rate=settings.learning_rate, batch_tokens=settings.batch_tokens,
        seed=settings.seed,
    )  # fmt: skip
    metrics = {
        "validation": _losses(base, tokenizer, settings, rows["validation"]),
        "steps": settings.steps,
        "seconds": round(time.monotonic() - started, 1),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "command": command,
        "adapters": {name: folder.name for name, folder in settings.adapters.items()},
        "seed": settings.seed,
    }
    write_report(metrics, settings.out / METRICS)
    return metrics


def _files(settings: SoupSettings) -> Mapping[str, Path]:
    return {"train": settings.train, "validation": settings.validation}


def _rows(file: Path, tokenizer: Any, settings: SoupSettings) -> list[Encoded]:
    examples = read_conversations(file)
    names = sorted({domain for example in examples for domain in example.domains})
    found = encode_within(examples, tokenizer, settings.max_length, names)
    if not found:
        raise DataError(f"{file} holds no conversation of at most {settings.max_length} tokens.")
    return found


def _losses(base: Any, tokenizer: Any, settings: SoupSettings, rows: Sequence[Encoded]) -> dict[str, float]:
    """Nats of an answer's token, by contender."""
    own = [of_adapter(Adapter.load(folder)) for folder in settings.adapters.values()]
    even = concatenated([{name: (A, B / len(own)) for name, (A, B) in one.items()} for one in own])
    contenders: dict[str, Factors] = {
        _BASE: {},
        **dict(zip(settings.adapters, own, strict=True)),
        _EVEN: even,
        _SOUP: of_adapter(Adapter.load(settings.out)),
    }
    speaker = Speaker(base.eval(), tokenizer, batch=16)
    found = {}
    for name, factors in contenders.items():
        total, count = speaker.losses(rows, [factors] * len(rows)).sum(0).tolist()
        found[name] = total / count
    return found
