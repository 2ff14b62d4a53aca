"""How a stack serves many users: the same requests with an adapter for each of them, and with one for all."""

import datetime
import logging
import math
import platform
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molora.bench import machine_name
from molora.checks import linear_sizes
from molora.errors import ConfigError, StackError
from molora.factors import Factors, write_factors
from molora.model import MoLoRAModel
from molora.provenance import commit
from molora.serve.engine import Engine
from molora.serve.load import replay, report
from molora.serve.pool import Pool, Read
from molora.serve.traffic import Traffic, arrivals
from molora.serve.warm import warm
from molora.stack import AUTO

log = logging.getLogger("molora.serve")

_READERS = 8  # threads
_FILES = 32  # adapters on disk, which stand for those of all users: each user's is read and live for itself


def measure_serve(
    model: MoLoRAModel,
    traffic: Traffic,
    *,
    rows: int,
    live: int,
    rank: int,
    tick: Callable[[], None] = lambda: None,
    modules: Collection[str] | None = None,
    there: int = 0,
) -> dict[str, Any]:
    """Replays ``traffic`` twice: "one adapter", where all users have the same, and "own adapters".

    Args:
        model: with a shared layer, in which the users' adapters come and go; its other layers have their defaults.
        traffic: what comes.
        rows: sequences at once.
        live: adapters in the model at once.
        rank: of the users' adapters, which are random.
        tick: called after each answer, of 2 * requests.
        modules: which linear modules of the decoder layers they adapt, by the end of their names; None: all.
        there: of so many users, the ones that ask most, the adapters are live before the first request.

    Raises:
        StackError: the model has no shared layer. ConfigError: more adapters are to be there than can be.
    """
    if there > min(live, traffic.users):
        raise ConfigError(f"{there} adapters cannot be there: {live} can be live, of {traffic.users} users.")
    layer = next((layer.name for layer in model.stack.layers if layer.shared), None)
    if layer is None:
        raise StackError("The stack has no layer with shared: true, so no adapters of users can come and go in it.")
    coming = arrivals(traffic)
    kinds: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_random(model, Path(scratch) / str(number), rank, number, modules) for number in range(_FILES)]
        for kind in ("one adapter", "own adapters"):
            one = kind == "one adapter"
            pool = Pool(model, layer, lambda name: ("1", folders[int(name[1:]) % _FILES]), most=live)
            engine = Engine(
                model, rows=rows, longest=traffic.prompt[1] + traffic.answer[1], waiting=10**9, pools=[pool]
            )
            engine.start()
            began, warmed = time.perf_counter(), warm(engine)
            _fill(engine, pool, min(there, 1) if one else there)
            ready = {"warm": round(warmed, 2), "adapters": round(time.perf_counter() - began - warmed, 2)}
            log.info("%s: ready after %s s", kind, ready)
            found = replay(engine, coming, lambda user: {layer: f"u{0 if one else user}"}, tick)  # noqa: B023
            engine.close()
            kinds[kind] = {**report(found), "pool": vars(pool.stats()), "seconds to be ready": ready}
            for slot in [name for name in model.stack[layer].adapters if name not in _own(model, layer, pool)]:
                model.remove_adapter(layer, slot)
    ratio = kinds["own adapters"]["tokens a second"] / kinds["one adapter"]["tokens a second"]
    return {
        **_about(traffic),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [{"kind": kind, **values} for kind, values in kinds.items()],
        "sequences at once": rows,
        "rank": rank,
        "layers": {one.name: "auto" if one.default == AUTO else one.default for one in model.stack.layers},
        "ratio": round(ratio, 4),
    }


def _fill(engine: Engine, pool: Pool, users: int) -> None:
    """Makes the adapters of the first users live; few at a time are in the host's memory."""
    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, users, 2 * _READERS):
            names = [f"u{user}" for user in range(first, min(first + 2 * _READERS, users))]
            for read in readers.map(pool.read, names):
                engine.change([], partial(_bring, pool, read))


def _bring(pool: Pool, read: Read) -> None:
    """Makes an adapter live; in the engine's thread."""
    pool.lease(read)
    pool.release(read)


def measure_at(
    address: str, name: str, traffic: Traffic, key: str = "", tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Replays ``traffic`` at a server that runs; arguments and errors as of :func:`molora.serve.remote.replay_at`."""
    from molora.serve.remote import replay_at  # needs the extra "serve"

    found = replay_at(address, name, arrivals(traffic), key, tick)
    return {**_about(traffic), "address": address, "rows": [{"kind": name, **report(found)}]}


def _about(traffic: Traffic) -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(),
        "python": platform.python_version(),
        "seed": traffic.seed,
        "data": "random prompts; answers of the lengths that the trace has",
        "traffic": {**vars(traffic), "rate": traffic.rate if math.isfinite(traffic.rate) else None},
    }


def _own(model: MoLoRAModel, layer: str, pool: Pool) -> set[str]:
    """The layer's adapters that are not of the pool."""
    return {name for name in model.stack[layer].adapters if pool.shown(name) == name}


def write_random(
    model: MoLoRAModel, folder: Path, rank: int, seed: int, modules: Collection[str] | None = None
) -> Path:
    """A PEFT folder of random factors for linear modules of the decoder layers, by the ends of their names (None: all);
    returns ``folder``."""
    chance = torch.Generator().manual_seed(seed)
    factors: Factors = {
        name: (
            torch.randn(rank, inside, generator=chance) / inside**0.5,
            0.01 * torch.randn(outside, rank, generator=chance),
        )
        for name, (inside, outside) in linear_sizes(model.base).items()
        if "layers." in name and (modules is None or name.rpartition(".")[2] in modules)
    }
    write_factors(folder, factors, str(model.base_name))
    return folder
