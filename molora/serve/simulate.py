"""Many replicas on paper: the same requests as for a real server, and the rule by which its door places them.

A replica is taken on only when a request may come to it: between two requests replicas know nothing of each other.
"""

import datetime
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from molora.provenance import commit
from molora.serve.costs import Costs
from molora.serve.placement import Placement, at_once
from molora.serve.simulated import Asked, Replica
from molora.serve.traffic import Arrival, Traffic, arrivals


def simulate(
    coming: Sequence[Arrival],
    costs: Costs,
    *,
    replicas: int = 1,
    rows: int = 8,
    live: int = 64,
    waiting: int = 256,
    seed: int = 0,
) -> tuple[list[Asked], list[Replica]]:
    """Lets all requests come, and goes on until the last answer is whole.

    Args:
        coming: from :func:`molora.serve.traffic.arrivals`; each user has an adapter.
        costs: of one replica.
        replicas: how many there are, each with an accelerator.
        rows: sequences that run at once in a replica.
        live: adapters that are in its model at once.
        waiting: requests that may wait at a replica; it refuses others.
        seed: of the placement, and of the times in which adapters come.

    Returns:
        What became of each request, and the replicas as they are in the end.
    """
    chance = np.random.default_rng(seed)
    engines = [Replica(costs, rows, live, waiting, chance) for _ in range(replicas)]
    placement, most = Placement(replicas, seed), at_once(rows)
    found: list[Asked] = []
    crowds: dict[int, list[Asked]] = {}  # requests of each user that may be under way
    for one in coming:
        asked = Asked(one.at, one.user, one.prompt, one.prompt, one.answer)
        crowd = crowds.setdefault(one.user, [])
        if len(crowd) >= most:
            for number in {other.replica for other in crowd}:
                engines[number].advance(one.at)
            crowd[:] = [other for other in crowd if not other.over(one.at)]
        others = len(crowd) // most
        crowd.append(asked)

        def under_way(number: int, now: float = one.at) -> int:
            engines[number].advance(now)
            return engines[number].under_way

        asked.replica = placement.choose((one.user, others) if others else one.user, under_way)
        engines[asked.replica].advance(one.at)
        engines[asked.replica].submit(asked)
        found.append(asked)
    for engine in engines:
        engine.advance(math.inf)
    return found, engines


def report(found: Sequence[Asked], engines: Sequence[Replica]) -> dict[str, Any]:
    """Tokens and requests a second, seconds at the 50th, 95th and 99th percentile, and shares."""
    whole = [one for one in found if one.done is not None]
    told = {"asked": len(found), "answered": len(whole), "refused": sum(one.refused for one in found)}
    if not whole:
        return told
    span = max(1e-9, max(one.last for one in whole) - min(one.at for one in whole))
    gaps: Counter[float] = sum((engine.gaps for engine in engines), Counter())
    hits, misses = (sum(getattr(engine.adapters, name) for engine in engines) for name in ("hits", "misses"))
    return {
        **told,
        "seconds": round(span, 3),
        "requests a second": round(len(whole) / span, 3),
        "tokens a second": round(sum(one.tokens for one in whole) / span, 2),
        "seconds to the first token": _percentiles(Counter(one.first - one.at for one in whole)),
        "seconds between tokens": _percentiles(gaps),
        "live": round(hits / max(1, hits + misses), 4),
        "read": sum(engine.adapters.reads for engine in engines),
        "refused share": round(told["refused"] / len(found), 4),
        "busy": round(sum(engine.busy for engine in engines) / span / len(engines), 4),
    }


def _percentiles(counts: Counter[float]) -> dict[str, float]:
    if not counts:
        return {}
    values = np.array(sorted(counts))
    below = np.cumsum([counts[value] for value in values.tolist()])
    places = np.searchsorted(below, np.array([50, 95, 99]) / 100 * below[-1])
    return {f"p{share}": float(f"{values[place]:.4g}") for share, place in zip((50, 95, 99), places, strict=True)}


def simulated(costs: Costs, traffic: Traffic, *, replicas: int, rows: int, live: int) -> dict[str, Any]:
    """A simulation as a record of results; arguments as of :func:`simulate`."""
    found, engines = simulate(arrivals(traffic), costs, replicas=replicas, rows=rows, live=live, seed=traffic.seed)
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{replicas} of {costs.machine}, by costs of {costs.date}, {costs.model}, {costs.dtype}",
        "seed": traffic.seed,
        "data": "no model ran: simulated requests and measured costs",
        "rows": [{"replicas": replicas, "users": traffic.users, **report(found, engines)}],
        "must": [],
        "costs": asdict(costs),
    }
