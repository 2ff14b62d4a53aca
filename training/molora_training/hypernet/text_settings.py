"""Settings of the trainer of networks that turn a text into an adapter."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from molora.base import DEFAULT_BASE
from molora.errors import ConfigError
from molora.personalize.embeddings import DEFAULT_ENCODER
from molora_training.hypernet.loop import LoopSettings
from molora_training.settings import work_folder


@dataclass(frozen=True)
class GroupFiles:
    """What to learn from: a folder with three files for each group, which is a user or a task.

    ``<group>.train.jsonl`` and ``<group>.validation.jsonl`` hold conversations, ``<group>.texts.json`` a list of texts
    that stand for it: descriptions, or profiles. `source` and `licence` go into the model card.

    Args:
        held_out: groups that are never learnt from, by their names, or the share of them, picked by name; None: those
            that the folder's held-out.json names, and where there is none, a tenth.
        max_length: tokens; longer conversations are left out.
        validate: how many of a group's validation conversations are looked at.
    """

    folder: Path
    held_out: tuple[str, ...] | float | None = None
    max_length: int = 1024
    validate: int = 32
    source: str = "not stated"
    licence: str = "not stated"

    def __post_init__(self) -> None:
        if isinstance(self.held_out, float) and not 0 <= self.held_out < 1:
            raise ConfigError(f"data.held_out must be names of groups, or a share from 0 to 1, not {self.held_out}.")
        if self.max_length < 2 or self.validate < 1:
            raise ConfigError(
                f"data.max_length must be at least 2 tokens and data.validate at least 1, not {self.max_length} and "
                f"{self.validate}."
            )


@dataclass(frozen=True)
class NetShape:
    """The network, as :class:`molora.personalize.text_net.TextNetConfig`; `targets` are ends of modules' names, or
    "all-linear"."""

    width: int = 128
    rank: int = 8
    alpha: float = 0.0
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    head: Literal["L", "M"] = "L"
    dropout: float = 0.05


@dataclass(frozen=True)
class TextHypernetSettings:
    """One training.

    Args:
        out: where the network goes.
        data: the groups.
        loop: how long and how fast.
        net: the network's shape.
        base: which stays frozen.
        encoder: of the texts, a folder or a Hub id.
        way: "learn" from the conversations, through the base; or "reconstruct" adapters that were trained before, one
            for each group, which is here for comparison: the papers find it worse.
        adapters: folder of those, by group.
        groups: of a step, drawn with a probability in proportion to the square root of their conversations' number.
        conversations: of each of them.
        dtype: of the frozen base; the network trains in float32.
    """

    out: Path
    data: GroupFiles
    loop: LoopSettings
    net: NetShape = field(default_factory=NetShape)
    base: str = DEFAULT_BASE
    encoder: str = DEFAULT_ENCODER
    way: Literal["learn", "reconstruct"] = "learn"
    adapters: Path | None = None
    groups: int = 8
    conversations: int = 4
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.conversations < 1:
            raise ConfigError(
                f"groups and conversations must be whole numbers from 1, not {self.groups} and {self.conversations}."
            )
        if (self.way == "reconstruct") != (self.adapters is not None):
            raise ConfigError("way is 'reconstruct' where adapters names those to reconstruct: give both, or neither.")

    @property
    def work(self) -> Path:
        """Where checkpoints and curves of this training lie."""
        return work_folder("hypernet", self.out)

    def record(self) -> dict[str, Any]:
        """The settings as plain values, paths as names: those mean nothing elsewhere."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self), default=lambda value: value.name))
        return record
