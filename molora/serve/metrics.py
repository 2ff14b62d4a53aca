"""Counts and times of the server, as Prometheus reads them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from molora.serve.engine import Engine
    from molora.serve.store import AdapterStore

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GONE = 499  # the client left before it had an answer


class Metrics:
    """Of one server; in a registry of its own, so that several can live in a process.

    Args:
        engine: answers. store: where its pools find adapters.
    """

    def __init__(self, engine: "Engine", store: "AdapterStore | None" = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "molora_http_requests", "Requests that were answered.", ("endpoint", "status"), registry=self.registry
        )
        self.first_token = Histogram(
            "molora_time_to_first_token_seconds",
            "From a sequence's submission to its first token.",
            buckets=_FIRST_S,
            registry=self.registry,
        )
        self.token = Histogram(
            "molora_time_per_token_seconds",
            "Between two tokens of a sequence.",
            buckets=_TOKEN_S,
            registry=self.registry,
        )
        self.registry.register(_EngineCounts(engine, store))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCounts:
    """What the engine and its store count themselves, asked when somebody looks."""

    def __init__(self, engine: "Engine", store: "AdapterStore | None") -> None:
        self.engine, self.store = engine, store

    def collect(self) -> Iterator[Any]:
        stats = self.engine.stats()
        yield GaugeMetricFamily("molora_running", "Sequences that are being continued.", stats.running)
        yield GaugeMetricFamily("molora_waiting", "Sequences that wait for a row.", stats.waiting)
        yield GaugeMetricFamily("molora_rows", "Sequences that can run at once.", stats.rows)
        yield CounterMetricFamily("molora_sequences", "Sequences that were submitted.", stats.requests_total)
        yield CounterMetricFamily("molora_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens_total)
        yield CounterMetricFamily("molora_generated_tokens", "Tokens that were generated.", stats.tokens_total)
        prefixes = self.engine.prefixes.stats()
        yield GaugeMetricFamily("molora_prefix_bytes", "Beginnings of prompts that are kept.", prefixes.held)
        yield CounterMetricFamily("molora_prefix_tokens", "Tokens of prompts that were not read again.", prefixes.found)
        if self.engine.pools:
            yield from self._pools()
        if self.store is not None:
            yield CounterMetricFamily(
                "molora_store_evictions", "Copies of a store's adapters that left the disk.", self.store.evictions
            )

    def _pools(self) -> Iterator[Any]:
        live = GaugeMetricFamily("molora_live_adapters", "Adapters of a store in the model.", labels=["layer"])
        pinned = GaugeMetricFamily("molora_pinned_adapters", "Of those, such as always stay.", labels=["layer"])
        found = CounterMetricFamily(
            "molora_adapters",
            "Requests' adapters that were live (hits), or were put in from the host's memory (misses); and such as had "
            "to be read into it.",
            labels=["layer", "at"],
        )
        evicted = CounterMetricFamily(
            "molora_adapter_evictions",
            "Adapters that left the model (live) or the host's memory (host) to make room.",
            labels=["layer", "at"],
        )
        for layer, pool in self.engine.pools.items():
            stats = pool.stats()
            live.add_metric([layer], stats.live)
            pinned.add_metric([layer], stats.pinned)
            for at, count in (("live", stats.live_hits), ("host", stats.host_hits), ("read", stats.reads)):
                found.add_metric([layer, at], count)
            for at, count in (("live", stats.evictions), ("host", stats.host_evictions)):
                evicted.add_metric([layer, at], count)
        yield from (live, pinned, found, evicted)


class CountRequests:
    """Counts every answer by its route, not its path, of which there would be too many."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(status)).inc()


def merged(texts: Mapping[str, str]) -> bytes:
    """The metrics of several replicas as one text, each with its replica's name."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                family.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry)


class _Collected(Collector):
    """Hands out what was read elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families
