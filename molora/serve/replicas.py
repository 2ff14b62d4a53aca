"""Several replicas of the server on Ray Serve: a door that is asked, and engines that answer behind it.

Each engine's replica has the whole server of ``molora serve`` inside; the door chooses one by the adapters that a
request names. Ray keeps the number of replicas, replaces those that end, and drains those that are taken away.
"""

import logging
import os
import queue
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from molora.errors import ConfigError
from molora.saved import load
from molora.serve.failures import EngineFailure
from molora.serve.forward import Reply, answer, build_door
from molora.serve.keys import Keys
from molora.serve.placement import KEPT_KEYS, at_once
from molora.serve.proxies import SETTINGS
from molora.stack import Stack

log = logging.getLogger("molora.serve")

APP = "molora"
DRAIN_S = 30.0  # that answers under way have when their replica is told to stop
CHECK_S = 2.0  # between two looks at a replica's health; the third bad one in a row replaces it
_MEASURED_S = 5.0
_MOST_ONGOING = 1024  # of a replica, more than an engine lets wait: it refuses the others itself, in its own words


@dataclass(frozen=True)
class Serving:
    """What every replica is made from; paths and URLs are those of its machine.

    Args:
        model: a saved MoLoRA, folder or Hub id. dtype: of the base's weights.
        rows, longest: as of the engine.
        store, live: a store's URL, and how many of its adapters are in a replica's model at once.
        keys: the file of keys. hosts: the names under which the door may be asked; None: any.
        replicas, most_replicas: how many there are, and up to how many there may be while many ask.
        cpus, gpus: that each of them takes.
        router: of the store, that serves and whose newer versions are taken up.
    """

    model: str
    dtype: str = "bfloat16"
    rows: int = 8
    longest: int = 2048
    store: str | None = None
    live: int = 64
    keys: Path | None = None
    hosts: tuple[str, ...] | None = None
    replicas: int = 2
    most_replicas: int | None = None
    cpus: int = 1
    gpus: float = 0.0
    router: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1 or _most(self) < self.replicas:
            raise ConfigError(
                f"At least one replica, and not fewer at most than at least: not {self.replicas} to "
                f"{self.most_replicas}."
            )


class Replica:
    """An engine with its server, in a process of its own."""

    def __init__(self, serving: Serving) -> None:
        import torch

        from molora.model import MoLoRAModel  # here, so that the door's process needs none of it
        from molora.serve.app import build_app
        from molora.serve.engine import Engine
        from molora.serve.pins import StoredPins
        from molora.serve.pool import Pool
        from molora.serve.routers import StoredRouter
        from molora.serve.store import AdapterStore
        from molora.serve.warm import warm
        from molora.settled import settle

        model = MoLoRAModel.from_pretrained(
            serving.model,
            dtype=getattr(torch, serving.dtype),
            device_map="cuda" if torch.cuda.is_available() else None,
        )
        self.store = AdapterStore(serving.store) if serving.store is not None else None
        pools = (
            [Pool(model, layer, self.store.finder(layer), most=serving.live) for layer in _shared(model.stack)]
            if self.store is not None
            else []
        )
        self.engine = Engine(model, rows=serving.rows, longest=serving.longest, pools=pools)
        keys = Keys(serving.keys) if serving.keys is not None else None
        self.app: FastAPI = build_app(self.engine, keys=keys, store=self.store)
        self.engine.start()
        self.followed: list[StoredRouter | StoredPins] = []
        if self.store is not None and pools:
            self.followed.append(StoredPins(self.engine, self.store))
        if self.store is not None and serving.router is not None:
            self.followed.append(StoredRouter(self.engine, self.store, serving.router))
        if model.device.type == "cuda":
            warm(self.engine)
        settle()

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The server's messages for a request."""
        if key := serve.get_multiplexed_model_id():
            await self.keep(key)
        async for message in answer(self.app, scope, body):
            yield message

    @serve.multiplexed(max_num_models_per_replica=KEPT_KEYS)
    async def keep(self, key: str) -> str:
        """Lets Ray know whose requests come here. The adapters themselves are the pools' business."""
        return key

    async def measured(self) -> tuple[str, str]:
        """This replica's name and metrics."""
        asked = {"method": "GET", "path": "/metrics", "query_string": b"", "headers": []}
        parts = [message.get("body", b"") async for message in answer(self.app, asked, b"")]
        return serve.get_replica_context().replica_id.unique_id, b"".join(parts).decode()

    def check_health(self) -> None:
        """
        Raises:
            EngineFailure: its thread has ended, and nothing would be answered any more.
        """
        if not self.engine.runs:
            raise EngineFailure("The engine's thread has ended.")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            for followed in getattr(self, "followed", ()):
                followed.close()
            self.engine.close()
            if self.store is not None:
                self.store.close()


@serve.ingress()
class Door:
    """What is asked from outside; see :mod:`molora.serve.forward`.

    Args:
        engine: the replicas.
        own: the adapters that the saved stack itself has, by layer.
        pooled: layers whose other adapters come from the store.
        at_once: requests for the same adapters that one replica is given at once.
        keys, hosts: as in :class:`Serving`.
    """

    def __init__(
        self,
        engine: DeploymentHandle,
        own: Mapping[str, frozenset[str]],
        pooled: frozenset[str],
        at_once: int,
        keys: Path | None,
        hosts: tuple[str, ...] | None,
    ) -> None:
        self.engine, self.own, self.pooled, self.keys, self.hosts = engine, own, pooled, keys, hosts
        self.at_once = at_once

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_door(
            self._ask,
            self._measured,
            shared=self.pooled,
            fixed=self._fixed,
            at_once=self.at_once,
            keys=Keys(self.keys) if self.keys is not None else None,
            hosts=self.hosts,
        )

    def _ask(self, key: str, scope: Mapping[str, Any], body: bytes) -> Reply:
        chosen: Any = self.engine.options(method_name="answer", stream=True, multiplexed_model_id=key)
        return chosen.remote(scope, body)

    async def _measured(self) -> dict[str, str]:
        return dict(await self.engine.broadcast("measured").results_async(timeout_s=_MEASURED_S))

    def _fixed(self, layer: str, name: str) -> bool:
        return layer in self.own and (layer not in self.pooled or name in self.own[layer])


def application(serving: Serving) -> serve.Application:
    """The door and its replicas, for ``serve.run``.

    Raises:
        StackError, ConfigError: there is no such stack, or a store that none of its layers can use.
    """
    stack = load(serving.model).stack
    pooled = frozenset(_shared(stack) if serving.store is not None else ())
    if serving.store is not None and not pooled and serving.router is None:
        raise ConfigError("The stack has no layer with shared: true, in which a store's adapters could come and go.")
    many: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.most_replicas is not None:
        many = {
            "autoscaling_config": {
                "min_replicas": serving.replicas,
                "max_replicas": serving.most_replicas,
                "target_ongoing_requests": serving.rows,  # one more would wait for a row
            }
        }
    engine = serve.deployment(
        name="Engine",
        max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=CHECK_S,
        **many,
    )(Replica)
    door = serve.deployment(
        name="Door",
        max_ongoing_requests=_MOST_ONGOING * _most(serving),
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,  # an old one goes when the new one is there: there is one only
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )(Door)
    own = {layer.name: frozenset(layer.adapters) for layer in stack.layers}
    return door.bind(engine.bind(serving), own, pooled, at_once(serving.rows), serving.keys, serving.hosts)


def deploy(serving: Serving) -> None:
    """Starts the replicas, or replaces those that run one after another: each ends first what it has begun.

    Raises:
        MoLoRAError: as ``application``.
    """
    serve.run(application(serving), name=APP, route_prefix="/")


def run(serving: Serving, host: str, port: int, cluster: str | None = None) -> None:
    """Serves until it is told to stop. Told to read its stack again (SIGHUP), it deploys anew.

    Args:
        cluster: the address of a Ray cluster; None: one of its own on this machine, which ends with it.
    """
    told: queue.SimpleQueue[int] = queue.SimpleQueue()  # of signals: a handler may put there whatever is interrupted
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to Ray's makers unasked
    ray.init(runtime_env={"env_vars": SETTINGS}, **({"address": cluster} if cluster else _local(serving)))
    serving = _sized(_whole(serving), alone=cluster is None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ray has set handlers of its own
        signal.signal(number, lambda got, _: told.put(got))
    try:
        serve.start(http_options={"host": host, "port": port})
        deploy(serving)
        while told.get() == signal.SIGHUP:
            try:
                deploy(serving)
            except Exception:  # what runs goes on
                log.exception("The stack could not be deployed again.")
    finally:
        serve.delete(APP)
        ray.shutdown()


def _whole(serving: Serving) -> Serving:
    """With whole paths: a replica may start in another folder."""
    model, store = Path(serving.model).expanduser(), serving.store
    return replace(
        serving,
        model=str(model.resolve()) if model.is_dir() else serving.model,
        store=store if store is None or "://" in store else str(Path(store).expanduser().resolve()),
        keys=serving.keys and serving.keys.resolve(),
    )


def _local(serving: Serving) -> dict[str, Any]:
    """Settings of a cluster on this machine alone, which has room for all replicas."""
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, _most(serving)),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }


def _sized(serving: Serving, alone: bool) -> Serving:
    """With what each replica takes: a GPU, or its part where there are fewer; cores are shared out where it is alone
    with the others."""
    most = _most(serving)
    gpus = min(1.0, int(1e4 * ray.cluster_resources().get("GPU", 0.0) / most) / 1e4)  # Ray counts in ten-thousandths
    return replace(serving, gpus=gpus, cpus=max(1, (os.cpu_count() or 1) // most) if alone else 1)


def _most(serving: Serving) -> int:
    return serving.most_replicas or serving.replicas


def _shared(stack: Stack) -> list[str]:
    return [layer.name for layer in stack.layers if layer.shared]
