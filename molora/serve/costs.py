"""What serving costs on a machine, in seconds: read from a file for :mod:`molora.serve.simulate`, or measured."""

import datetime
import json
import math
import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molora.errors import ConfigError, StackError
from molora.provenance import commit

if TYPE_CHECKING:
    from molora.model import MoLoRAModel
    from molora.serve.engine import Engine
    from molora.serve.requests import Event

Points = tuple[tuple[float, float], ...]

_PROMPTS = (8, 16, 32, 48, 64, 96, 128, 256, 512, 1024)  # tokens of those that are timed, up to the engine's chunk
_STEPS = 24  # of each number of rows, in a round
_ROUNDS = 4  # in which all is timed in turns, so that a machine that becomes slower is so for all
_BEFORE = 64  # tokens of the prompts before the steps that are timed
_ADAPTERS = 12  # that are brought


@dataclass(frozen=True)
class Costs:
    """Seconds, and what else a simulation must know of a machine.

    Points (n, seconds) are in order of n. Between two of them a straight line holds, after the last one the line goes
    on, and below the first one its seconds.

    Args:
        step: of one step of n rows.
        prompt: of one forward that reads n tokens of prompts.
        fetch: mean time until an adapter that only the disk or the store has is in the host's memory.
        fetch_spread: its standard deviation.
        swap: of the engine's thread to make an adapter live that is in the host's memory.
        chunk: tokens of prompts that the engine reads between two steps.
        adapter_bytes: of one adapter in the host's memory; 0: all fit there.
        machine, model, dtype, commit, date: of the measurement.
    """

    step: Points
    prompt: Points
    fetch: float
    swap: float
    fetch_spread: float = 0.0
    chunk: int = 256
    adapter_bytes: int = 0
    machine: str = "unknown"
    model: str = "unknown"
    dtype: str = "unknown"
    commit: str = "unknown"
    date: str = "unknown"

    def __post_init__(self) -> None:
        for name in ("step", "prompt"):
            object.__setattr__(self, name, _points(name, getattr(self, name)))
        if not all(seconds > 0 for _, seconds in self.step):
            raise ConfigError("Costs: a step takes more than 0 seconds.")
        for name in ("fetch", "fetch_spread", "swap", "chunk", "adapter_bytes"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"Costs: {name} is a number from 0 on, not {value!r}.")
        for name in ("chunk", "adapter_bytes"):
            if not isinstance(getattr(self, name), int) or self.chunk < 1:
                raise ConfigError(f"Costs: {name} is a whole number, not {getattr(self, name)!r}.")

    def of_step(self, rows: int) -> float:
        """Seconds of a step."""
        return max(1e-9, _at(self.step, rows))

    def of_prompt(self, tokens: int) -> float:
        """Seconds of a forward that reads ``tokens``."""
        return max(0.0, _at(self.prompt, tokens))


def read_costs(path: Path) -> Costs:
    """Reads a file that :func:`write_costs` or a person wrote.

    Raises:
        ConfigError: there is none, or it says something else.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no file of costs in JSON ({type(error).__name__}).") from error
    known = [field.name for field in fields(Costs)]
    if not isinstance(told, dict):
        raise ConfigError(f"{path}: a file of costs is one JSON object.")
    if strange := sorted(set(told) - set(known)):
        raise ConfigError(f"{path}: a file of costs has no {', '.join(strange)}; it has {', '.join(known)}.")
    if missing := [name for name in known[:4] if name not in told]:
        raise ConfigError(f"{path}: {', '.join(missing)} is missing. `molora bench costs` measures it.")
    try:
        return Costs(**told)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_costs(costs: Costs, path: Path) -> None:
    """Writes a file for :func:`read_costs`."""
    from molora.atomic import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(costs).items())
    write_text(path, f"{{{lines}}}\n")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(name: str, told: Any) -> Points:
    whole = isinstance(told, list | tuple) and all(isinstance(one, list | tuple) and len(one) == 2 for one in told)
    if not whole or not told or not all(_is_number(value) and value >= 0 for one in told for value in one):
        raise ConfigError(f"Costs: {name} is a list of points [number, seconds], not {told!r}.")
    if any(later[0] <= earlier[0] for earlier, later in pairwise(told)):
        raise ConfigError(f"Costs: the points of {name} are not in order.")
    return tuple((float(number), float(seconds)) for number, seconds in told)


def _at(points: Points, number: float) -> float:
    if number <= points[0][0] or len(points) == 1:
        return points[0][1]
    end = next((place for place in range(1, len(points)) if number <= points[place][0]), len(points) - 1)
    (low, before), (high, after) = points[end - 1], points[end]
    return before + (after - before) * (number - low) / (high - low)


def measure_costs(model: "MoLoRAModel", *, rows: Sequence[int] = (1, 2, 4, 8), rank: int = 16) -> Costs:
    """Times the engine on this machine: steps whose sequences have an adapter each, prompts, and adapters brought.

    Args:
        model: with a shared layer, in which random adapters come and go; its other layers have their defaults.
        rows: numbers of sequences at once.
        rank: of the adapters.

    Raises:
        StackError: the model has no shared layer.
    """
    import torch

    from molora.bench import machine_name
    from molora.serve.engine import Engine
    from molora.serve.measure import write_random
    from molora.serve.pool import Pool
    from molora.serve.warm import warm

    layer = next((layer.name for layer in model.stack.layers if layer.shared), None)
    if layer is None:
        raise StackError("The stack has no layer with shared: true, so no adapters of users can come and go in it.")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_random(model, Path(scratch) / str(number), rank, number) for number in range(_ADAPTERS)]
        most, longest = max(*rows, 2), max(*_PROMPTS, _BEFORE) + _STEPS + max(rows)
        pool = Pool(model, layer, lambda name: ("1", folders[int(name[1:]) % _ADAPTERS]), most=most)
        own = set(model.stack[layer].adapters)
        engine = Engine(model, rows=max(rows), longest=longest, waiting=10**9, pools=[pool])
        steps: dict[int, list[float]] = {number: [] for number in sorted(set(rows))}
        sizes = sorted({min(tokens, engine.chunk, engine.longest - 1) for tokens in _PROMPTS})
        prompts: dict[int, list[float]] = {tokens: [] for tokens in sizes}
        engine.start()
        warm(engine)
        try:
            for _ in range(_ROUNDS):
                for number in steps:
                    steps[number].append(_time_step(engine, layer, number))
                for tokens in prompts:
                    prompts[tokens].append(_time_prompt(engine, layer, tokens))
        finally:
            engine.close()
        fetch, swap, size = _time_adapters(pool)
        for name in set(model.stack[layer].adapters) - own:
            model.remove_adapter(layer, name)
    return Costs(
        step=tuple((number, _rounded(statistics.mean(found))) for number, found in steps.items()),
        prompt=tuple((tokens, _rounded(statistics.mean(found))) for tokens, found in prompts.items()),
        fetch=_rounded(statistics.mean(fetch)),
        fetch_spread=_rounded(statistics.stdev(fetch)),
        swap=_rounded(statistics.mean(swap)),
        chunk=engine.chunk,
        adapter_bytes=size,
        machine=f"{machine_name()}, {torch.get_num_threads()} threads",
        model=str(model.base_name),
        dtype=str(model.dtype).removeprefix("torch."),
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )


def _ask(engine: "Engine", layer: str, users: int, prompt: int, answer: int) -> list[list[float]]:
    """Asks for as many answers at once; returns when each was asked for and when each of its tokens came."""
    from molora.serve.requests import Finished, Request, Sampling

    vocabulary = int(engine.model.config.get_text_config().vocab_size)
    chance = np.random.default_rng(time.perf_counter_ns())  # no prompt begins as an earlier one
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    times: list[list[float]] = [[] for _ in range(users)]

    def tell(user: int, event: "Event") -> None:
        if isinstance(event, Finished):
            ended.put(event.error)
        else:
            times[user].append(time.perf_counter())

    for user in range(users):
        ids = chance.integers(3, vocabulary, prompt).tolist()
        sampling = Sampling(temperature=0, max_tokens=answer)
        times[user].append(time.perf_counter())
        engine.submit(Request(ids, {layer: f"u{user}"}, sampling, user=str(user), ends=False), partial(tell, user))
    for _ in range(users):
        if (error := ended.get()) is not None:
            raise error
    return times


def _time_step(engine: "Engine", layer: str, rows: int) -> float:
    """The mean of steps in which all sequences take part: long ones are waited for, too."""
    _ask(engine, layer, rows, 16, 2)  # brings their adapters
    times = _ask(engine, layer, rows, _BEFORE, _STEPS + rows)
    begun, ended = max(one[1] for one in times), min(one[-1] for one in times)
    steps = [moment for moment in times[0][1:] if begun <= moment <= ended]
    return (steps[-1] - steps[0]) / (len(steps) - 1)


def _time_prompt(engine: "Engine", layer: str, tokens: int) -> float:
    """The time until a prompt's first token is there, asked alone; the adapter is live."""
    _ask(engine, layer, 1, 1, 1)
    ((asked, first),) = _ask(engine, layer, 1, tokens, 1)
    return first - asked


def _time_adapters(pool: Any) -> tuple[list[float], list[float], int]:
    """Seconds to read each of some adapters, seconds to make it live in another one's place, and its bytes. To be
    called when the pool's engine has ended."""
    fetch, swap, size = [], [], 0
    for number in range(_ADAPTERS):
        begun = time.perf_counter()
        read = pool.read(f"u{1000 * _ADAPTERS + number}")  # nobody has asked for it yet
        fetch.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        pool.lease(read)
        swap.append(time.perf_counter() - begun)
        pool.release(read)
        size = read.packed.adapter.nbytes
    return fetch, swap, size


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
