"""Which updates the server takes: one that is malformed, wild, old or boastful is refused, and the round goes on.

It sees single updates, so it cannot guard a round whose updates come masked (see `docs/federated.md`).
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from molora.errors import UpdateError
from molora_training.federated import row
from molora_training.federated.lora import Lora, distance, read_bytes

FEWEST = 3  # updates of a round that have a median
_MOST = 1e30  # norm of a change; float32 holds 3e38, and what is made of the changes has to fit


@dataclass(frozen=True)
class Asked:
    """What a client was asked for: the round and a number used once, and the factors that it went on from.

    moments: the shape of a row's (:mod:`~molora_training.federated.row`), if it is to tell those.
    """

    round: int
    nonce: str
    sent: Lora
    moments: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Update:
    """An update that may be taken.

    norm: of what changed, as the guard measures it. digest: of its tensors. moments: of a row.
    """

    factors: Lora
    examples: int
    norm: float
    digest: str
    moments: torch.Tensor | None = None


@dataclass
class Guard:
    """Checks updates of one training.

    Args:
        max_examples: that a client was asked to learn from; so many it may say.
        max_norm: times the round's median that an update may change.
        seen: digests of all updates that were taken before.
        measure: how far an update is from what was sent, in what the server adds up: deltas, or factors. A tiny A
            beside a huge B is an ordinary delta, and ruins a sum of B alone.
    """

    max_examples: int
    max_norm: float
    seen: set[str] = field(default_factory=set)
    measure: Callable[[Lora, Lora], float] = distance

    def read(self, message: bytes, asked: Asked) -> Update:
        """One client's answer by itself.

        Raises:
            UpdateError: it may not be taken.
        """
        tensors, about, scale = read_bytes(message)
        if about.get("round") != asked.round or about.get("nonce") != asked.nonce:
            raise UpdateError(f"it answers round {about.get('round')!r} of another order: a replay, or too late")
        wanted = asked.sent.tensors()
        if asked.moments is not None:
            wanted[row.MESSAGE] = torch.empty(asked.moments)
        _check_tensors(tensors, wanted)
        if scale != asked.sent.scale:
            raise UpdateError(f"its scale is {scale}, and {asked.sent.scale} was sent")
        examples = about.get("examples")
        if not isinstance(examples, int) or isinstance(examples, bool) or not 1 <= examples <= self.max_examples:
            raise UpdateError(f"it claims {examples!r} examples, and 1 to {self.max_examples} are believed")
        digest = digest_of(tensors)
        if digest in self.seen:
            raise UpdateError("the same tensors came before: a replay")
        factors = Lora.from_tensors(tensors, scale)
        norm = self.measure(factors, asked.sent)
        if not norm <= _MOST:
            raise UpdateError(f"what it changes has a norm of {norm:.3g}, of which nothing finite can be made")
        moments = tensors.get(row.MESSAGE)
        if moments is not None:
            row.check_moments(moments)
        return Update(factors, examples, norm, digest, moments)

    def compare(self, updates: Mapping[str, Update]) -> dict[str, str]:
        """The updates of a round beside each other: whose are refused, and why."""
        refused = {}
        median = _median([one.norm for one in updates.values()])
        sizes = {client: float(one.moments.norm()) for client, one in updates.items() if one.moments is not None}
        usual = _median(list(sizes.values()))
        digests: set[str] = set()
        for client, one in updates.items():
            if one.norm > self.max_norm * median:
                times = one.norm / median if median else math.inf
                refused[client] = f"it changes {times:.3g} times the round's median, and {self.max_norm:g} is the most"
            elif sizes.get(client, 0.0) > self.max_norm * usual:
                refused[client] = f"its row's moments are over {self.max_norm:g} times the round's median"
            elif one.digest in digests:
                refused[client] = "another client of this round sent the same tensors"
            digests.add(one.digest)
        return refused

    def keep(self, updates: Iterable[Update]) -> None:
        """Remembers what became part of the adapter."""
        self.seen |= {one.digest for one in updates}


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values, whatever is said beside them."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + b"\0" + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_tensors(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    missing, strange = _some(wanted.keys() - tensors.keys()), _some(tensors.keys() - wanted.keys())
    if missing or strange:
        raise UpdateError(f"its tensors are not those that were sent (missing: {missing}; unknown: {strange})")
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != torch.float32:
            raise UpdateError(f"{name} is {tensor.dtype}, and torch.float32 was sent")
        if tensor.shape != wanted[name].shape:
            raise UpdateError(f"{name} is {list(tensor.shape)}, and {list(wanted[name].shape)} was sent")
        if not torch.isfinite(tensor).all():
            raise UpdateError(f"{name} holds NaN or infinite values")


def _median(found: Sequence[float]) -> float:
    return statistics.median(found) if len(found) >= FEWEST else math.inf


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:2]
    return ", ".join(first) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
