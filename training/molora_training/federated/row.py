"""A new adapter's row of the router, of what clients' features are like on average: no text and no feature leaves one.

A row is fitted to features q of the adapter's text (:mod:`molora.row_fit`). A client sends the mean of [1, q]^T [1, q]
over the tokens that it learnt from: means of means are means, so these are added as updates are, masked or not. Of
their mean the server draws features, normally distributed, and fits the row to those.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from molora import Router
from molora.errors import ConfigError, UpdateError
from molora.personalize.generated import generated
from molora.router import RouterConfig
from molora.row_fit import MOST
from molora.selection import router_rows
from molora.stack import Stack
from molora_training.continual.edits import NewRow, taken
from molora_training.data import Encoded
from molora_training.federated.local import acting
from molora_training.federated.lora import Lora

MESSAGE = "row"  # name of the moments' tensor among an update's
LARGEST = 256.0  # entry of the moments that a masked sum has room for: a feature of 16 throughout
_OFF = 1e-2  # that rounding may put moments off by


def reader_of(router: Router) -> bytes:
    """A router without rows and samples: what a client reads its text by."""
    bare = copy.deepcopy(router)
    for row in router.rows:
        bare.remove_row(row)
    about = {"config": vars(router.config), "hidden_size": router.hidden_size}
    return save(bare.state_dict(), {"router": json.dumps(about)})


def read_reader(message: bytes) -> Router:
    """What :func:`reader_of` wrote.

    Raises:
        UpdateError: it is something else.
    """
    try:
        size = int.from_bytes(message[:8], "little")
        about = json.loads(json.loads(message[8 : 8 + size])["__metadata__"]["router"])
        found = Router(RouterConfig.from_dict(about["config"]), ["none"], about["hidden_size"])
        found.remove_row("none")
        found.load_state_dict(load(message))
    except (SafetensorError, ConfigError, RuntimeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpdateError(f"the router in the order cannot be read ({type(error).__name__})") from None
    return found.eval()


@torch.no_grad()
def moments(reader: Router, base: Any, lora: Lora, below: Lora | None, rows: Sequence[Encoded]) -> torch.Tensor:
    """Of each part the mean of [1, q]^T [1, q] over all tokens: float32 [parts, 1 + hidden, 1 + hidden].

    A second part reads what the layers below it make of the text, where the first one gives it to the new adapter.
    """
    reader = reader.to(base.device)
    parts = list[Any](reader.parts)
    beneath = acting(below, base.device) if below is not None and len(parts) > 1 else {}
    own = acting(lora, base.device) if len(parts) > 1 else {}
    total = [torch.zeros(1 + reader.config.hidden, 1 + reader.config.hidden, dtype=torch.float64) for _ in parts]
    count = 0
    with generated(base, beneath), generated(base, own):
        for row in rows:
            ids = row.input_ids.to(base.device)[None]
            states: Any = ()
            if max(reader.points) > 0:
                states = base.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
            for index, part in enumerate(parts):
                z = part.read(states[part.reads] if part.reads else base.get_input_embeddings()(ids))
                q = part.features(z, torch.ones_like(ids, dtype=torch.bool), None)[0]
                total[index] += len(q) * moments_of(q).cpu()
            count += ids.shape[1]
    return (torch.stack(total) / count).float()


def moments_of(q: torch.Tensor) -> torch.Tensor:
    """[1 + hidden, 1 + hidden] float64 of features [tokens, hidden]."""
    x = torch.nn.functional.pad(q.double(), (1, 0), value=1.0)
    return x.T @ x / len(x)


def shape_of(router: Router) -> tuple[int, int, int]:
    """Of the moments for it."""
    return len(router.parts), 1 + router.config.hidden, 1 + router.config.hidden


def check_moments(found: torch.Tensor) -> None:
    """Raises UpdateError: no features have such moments. Finite ones of the right shape are expected."""
    for one in found.double():
        off = _OFF * float(one.abs().max())
        if abs(float(one[0, 0]) - 1) > _OFF or float((one - one.T).abs().max()) > off:
            raise UpdateError("its row's moments are no means of squares and products")
        if float(torch.linalg.eigvalsh((one + one.T) / 2)[0]) < -off:
            raise UpdateError("its row's moments are of no features: a variance is negative")


def to_vector(found: torch.Tensor, clip: float) -> torch.Tensor:
    """Moments as SecAgg+ takes them, whose entries lie within ``clip``: float32 [entries]."""
    return (found.clamp(-LARGEST, LARGEST) * (clip / LARGEST)).flatten()


def from_vector(vector: torch.Tensor, shape: Sequence[int], clip: float) -> torch.Tensor:
    """The other way round."""
    return vector.view(*shape) * (LARGEST / clip)


def drawn(found: torch.Tensor, count: int = MOST) -> torch.Tensor:
    """[count, hidden] float32, normally distributed with the moments [1 + hidden, 1 + hidden]."""
    one = found.double().cpu()
    one = (one + one.T) / 2 / one[0, 0]
    mean = one[0, 1:]
    values, vectors = torch.linalg.eigh(one[1:, 1:] - mean[:, None] * mean)
    normal = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # whatever the signs of the vectors
    return (mean + normal @ root).float()


def with_row(router: Router, stack: Stack, layer: str, name: str, found: torch.Tensor) -> NewRow:
    """The router of ``stack`` with a row for an adapter that it does not have, fitted to what has such moments."""
    new = copy.deepcopy(router)
    new.add_missing([*router_rows(stack), f"{layer}/{name}"])
    for part, own in enumerate(found):
        new.set_row(f"{layer}/{name}", part, drawn(own))
    return NewRow(new, taken(router, new, layer))
