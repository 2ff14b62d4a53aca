"""Two replicas on Ray Serve: they answer as one engine does, users find theirs again, and one may die."""

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
import typer
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from molora import VocabularyRouter
from molora.commands import serve as command
from molora.errors import ConfigError
from molora.selection import router_rows
from molora.serve.failures import EngineFailure
from molora.serve.keys import Keys
from molora.serve.store import AdapterStore
from tests.conftest import write_adapter
from tests.serve.live import unread, until
from tests.unit.spoken import make_spoken, save_spoken

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402

from molora.serve import forward, proxies, replicas  # noqa: E402

USERS = ("ada", "ben", "eve", "kim")
CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
LONG = 200  # tokens: what it takes lies far above what it takes to kill a process


class Cluster:
    """Two replicas behind a door, and the same server without Ray."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = make_spoken(root)
        self.store = AdapterStore(root / "store")
        for seed, user in enumerate(USERS):
            self.store.put("user", user, self.adapter(70 + seed))
        self.store.put_router("main", self.model.router)
        keys = Keys(root / "keys.json")
        self.boss, self.ada = keys.create("boss", ["use", "manage"]), keys.create("ada", ["use"], "ada")
        self.serving = replicas.Serving(
            str(save_spoken(self.model, root)),
            dtype="float32",
            rows=4,
            store=str(root / "store"),
            keys=keys.file,
            router="main",
        )
        self.alone = replicas.Replica(self.serving)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def adapter(self, seed: int) -> Path:
        return write_adapter(transformers.LlamaForCausalLM(self.model.config), self.root / f"adapter-{seed}", seed)

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key or self.boss, max_retries=0, timeout=60)

    def say(self, model: str, key: str | None = None, **more: Any) -> str:
        answer = self.client(key).chat.completions.create(model=model, **{"max_tokens": 12, **CHAT, **more})
        return answer.choices[0].message.content or ""

    def say_everywhere(self, model: str) -> set[str]:
        """What the replicas say, each asked at least once: past the door, which would always take the same one.

        One that is busy in the moment in which Ray counts its requests is passed over for the ten seconds that Ray
        keeps the count.
        """
        engine: Any = serve.get_deployment_handle("Engine", replicas.APP)
        engine = engine.options(method_name="answer", stream=True)
        headers = [(b"authorization", f"Bearer {self.boss}".encode()), (b"content-type", b"application/json")]
        scope = {"method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
        before, said = self.counts("molora_sequences_total"), set()
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            messages = engine.remote(scope, json.dumps({"model": model, "max_tokens": 12, **CHAT}).encode())
            body = b"".join(message.get("body", b"") for message in messages)
            said.add(json.loads(body)["choices"][0]["message"]["content"])
            now = self.counts("molora_sequences_total")
            if len(now) == 2 and all(now[name] > before[name] for name in now):
                return said
        raise AssertionError("one replica was never asked")

    def stream(self, model: str) -> Any:
        return self.client().chat.completions.create(model=model, stream=True, max_tokens=LONG, **CHAT)

    def expected(self, model: str, most: int = 12, alone: replicas.Replica | None = None) -> str:
        """What the server says without Ray."""
        headers = {"Authorization": f"Bearer {self.boss}"}
        reply = TestClient((alone or self.alone).app).post(
            "/v1/chat/completions", json={"model": model, "max_tokens": most, **CHAT}, headers=headers
        )
        return str(reply.json()["choices"][0]["message"]["content"])

    def counts(self, name: str, **labels: str) -> dict[str, float]:
        """A metric of each replica."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.address}/metrics", timeout=20).text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    found[sample.labels["replica"]] = found.get(sample.labels["replica"], 0.0) + sample.value
        return found

    def settle(self) -> None:
        """A user's requests that come in the instant of the first one may go elsewhere: Ray tells them by and by."""
        for user in USERS:
            self.say(f"base+user/{user}")
        threading.Event().wait(1.0)

    def home(self, user: str) -> str:
        """The replica that answers a user."""
        before = self.counts("molora_sequences_total")
        self.say(f"base+user/{user}")
        after = self.counts("molora_sequences_total")
        return next(name for name in after if after[name] > before.get(name, 0.0))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("replicas"))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": dict.fromkeys(proxies.SETTINGS, "tests.serve.hasty.middlewares")},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": made.port})
    replicas.deploy(made.serving)
    try:
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        made.store.close()


def test_replicas_answer_as_one_engine_does(cluster: Cluster) -> None:
    for model in ("base", "molora", "base+math", "base+auto", *(f"base+auto+user/{user}" for user in USERS)):
        said = cluster.say(model)
        assert said and said == cluster.expected(model), model
    told = cluster.stream("base+auto+user/ada")
    chunks = [chunk.choices[0].delta.content or "" for chunk in told if chunk.choices]
    assert "".join(chunks) == cluster.expected("base+auto+user/ada", LONG) and len(chunks) > LONG / 4
    assert cluster.client().models.retrieve("base+domain/math").id == "base+domain/math"


def test_a_user_stays_where_the_adapter_is(cluster: Cluster) -> None:
    cluster.settle()
    homes = {user: cluster.home(user) for user in USERS}
    assert set(homes.values()) == set(cluster.counts("molora_rows")) and len(set(homes.values())) == 2
    for _ in range(2):
        assert {user: cluster.home(user) for user in USERS} == homes
    known = cluster.counts("molora_sequences_total")
    for _ in range(3):  # the layer may be named by the field, too
        cluster.say("base", extra_body={"selection": {"user": "ada"}})
    assert cluster.counts("molora_sequences_total")[homes["ada"]] == known[homes["ada"]] + 3


def test_a_crowd_of_one_user_is_answered_by_both(cluster: Cluster) -> None:
    cluster.settle()
    before = cluster.counts("molora_sequences_total")
    expected = cluster.expected("base+user/ben", LONG)

    def crowd(size: int) -> list[str | None]:
        clients, together = [cluster.client() for _ in range(size)], threading.Barrier(size)

        def ask(client: openai.OpenAI) -> str | None:
            together.wait(60)
            answer = client.chat.completions.create(model="base+user/ben", max_tokens=LONG, **CHAT)
            return answer.choices[0].message.content

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(ask, clients))

    # Where few users are known at ben's replica, a first crowd may find its other answers there, too. Then Ray knows of
    # it, and of a larger one some go elsewhere.
    for size in (8, 16):
        assert crowd(size) == [expected] * size
        after = cluster.counts("molora_sequences_total")
    assert all(after[name] > before[name] for name in before) and len(before) == 2


def test_another_version_is_seen_by_every_replica(cluster: Cluster) -> None:
    old = cluster.expected("base+user/eve")
    assert cluster.say_everywhere("base+user/eve") == {old}
    cluster.store.put("user", "eve", cluster.adapter(90))
    new = cluster.expected("base+user/eve")
    assert old != new and cluster.say_everywhere("base+user/eve") == {new}


def test_a_pin_holds_where_the_users_requests_go(cluster: Cluster) -> None:
    ask = {"headers": {"Authorization": f"Bearer {cluster.boss}"}, "timeout": 20}
    kim = f"{cluster.address}/v1/adapters/user/kim/pin"
    cluster.settle()
    home = cluster.home("kim")
    pinned = cluster.counts("molora_pinned_adapters")
    assert pinned == dict.fromkeys(pinned, 0.0) and len(pinned) == 2
    assert httpx.put(kim, **ask).status_code == 204
    assert cluster.counts("molora_pinned_adapters") == {**pinned, home: 1.0} and cluster.home("kim") == home
    assert httpx.put(kim.replace("kim", "nobody"), **ask).status_code == 404
    assert httpx.put(kim.replace("user/kim", "domain/math"), **ask).status_code == 400
    listing = f"{cluster.address}/v1/adapters/user?pinned=true"
    assert httpx.get(listing, **ask).json()["data"] == ["kim"]
    later = replicas.Replica(cluster.serving)
    (pool,) = later.engine.pools.values()
    assert pool.pinned == []
    said = cluster.expected("base+user/kim", alone=later)
    assert pool.pinned == ["kim"] and said == cluster.say("base+user/kim")
    assert httpx.delete(kim, **ask).status_code == 204
    assert cluster.counts("molora_pinned_adapters") == pinned and httpx.get(listing, **ask).json()["data"] == []
    assert httpx.delete(kim, **ask).status_code == 404


def test_refusals_are_those_of_one_server(cluster: Cluster) -> None:
    with pytest.raises(openai.NotFoundError):
        cluster.say("gpt-4")
    with pytest.raises(openai.NotFoundError):
        cluster.say("base+user/ben", cluster.ada)
    with pytest.raises(openai.AuthenticationError):
        cluster.say("base", "wrong")
    with pytest.raises(openai.APIStatusError) as large:
        cluster.say("x" * (2 << 20))
    assert large.value.status_code == 413
    ask = {"headers": {"Authorization": f"Bearer {cluster.boss}"}, "timeout": 20}
    fixed = httpx.delete(f"{cluster.address}/v1/adapters/domain/math", **ask)
    assert fixed.status_code == 409 and fixed.json()["error"]["code"] == "fixed_adapter"
    assert "nobody" in httpx.delete(f"{cluster.address}/v1/adapters/user/nobody", **ask).json()["error"]["message"]
    mine = {"headers": {"Authorization": f"Bearer {cluster.ada}"}, "timeout": 20}
    assert httpx.delete(f"{cluster.address}/v1/adapters/domain/math", **mine).status_code == 403
    assert cluster.say("base+math") == cluster.expected("base+math")


def test_who_leaves_ends_what_runs_for_him(cluster: Cluster) -> None:
    before = sum(cluster.counts("molora_generated_tokens_total").values())
    with cluster.stream("base+user/ada") as told:
        next(iter(told))
        assert sum(cluster.counts("molora_running").values()) == 1
    assert until(lambda: sum(cluster.counts("molora_running").values()) == 0)
    assert sum(cluster.counts("molora_generated_tokens_total").values()) < before + LONG


def test_who_reads_too_slowly_is_cut(cluster: Cluster) -> None:
    before = sum(cluster.counts("molora_generated_tokens_total").values())
    large = {"stream": True, "n": 8, "max_tokens": LONG, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({"model": "base+auto", **CHAT, **large}).encode()
    with unread(cluster.address, "/v1/chat/completions", body, f"Authorization: Bearer {cluster.boss}") as slow:
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        assert until(lambda: sum(cluster.counts("molora_running").values()) == 0, 30)
    assert sum(cluster.counts("molora_generated_tokens_total").values()) < before + 8 * LONG


def test_a_replica_that_dies_ends_its_own_requests_only(cluster: Cluster) -> None:
    cluster.settle()
    homes = {user: cluster.home(user) for user in USERS}
    doomed = homes["ada"]
    safe = next(user for user, home in homes.items() if home != doomed)
    others, own = iter(cluster.stream(f"base+user/{safe}")), iter(cluster.stream("base+user/ada"))
    said = [next(others), next(own)][:1]
    failed: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            cluster.say("base+user/ada", max_tokens=LONG)
        failed.append(caught.value)

    whole = threading.Thread(target=ask)
    whole.start()
    assert until(lambda: cluster.counts("molora_running")[doomed] == 2)
    kill(doomed)
    with pytest.raises(openai.APIError, match="Ask again") as lost:
        list(own)
    assert not isinstance(lost.value, openai.APIConnectionError) and lost.value.code == "engine_failure"
    whole.join(30)
    assert failed[0].status_code == 503 and failed[0].response.headers["retry-after"] == "1"
    said += list(others)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices)
    assert text == cluster.expected(f"base+user/{safe}", LONG)
    assert cluster.say("base+user/ada") == cluster.expected("base+user/ada")  # from the other one
    while len(cluster.counts("molora_rows")) < 2:
        threading.Event().wait(0.5)
    assert doomed not in cluster.counts("molora_rows")


def kill(replica: str) -> None:
    actors = ray.util.list_named_actors(all_namespaces=True)
    (actor,) = (one for one in actors if one["name"].endswith(replica))
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)


def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    """The stack's own adapter changes; every answer is the old one or the new one, and at last the new one."""
    old, folder = cluster.expected("base+math"), Path(cluster.serving.model)
    write_adapter(transformers.LlamaForCausalLM(cluster.model.config), folder / "adapters" / "domain" / "math", 99)
    right = cluster.expected("base+math", alone=replicas.Replica(cluster.serving))
    before, ended, said = set(cluster.counts("molora_rows")), threading.Event(), []

    def ask() -> None:
        while not ended.is_set():
            said.append(cluster.say("base+math"))
            ended.wait(0.1)

    asker = threading.Thread(target=ask)
    asker.start()
    replicas.deploy(cluster.serving)
    ended.set()
    asker.join(30)
    assert not before & set(cluster.counts("molora_rows"))
    assert old != right and set(said) <= {old, right} and cluster.say("base+math") == right
    assert said[0] == old and len(said) > 10


def test_a_router_of_the_store_comes_to_every_replica(cluster: Cluster) -> None:
    vocabulary, rows = cluster.model.config.vocab_size, router_rows(cluster.model.stack)
    cluster.store.put_router("main", VocabularyRouter({"domain/code": [[0, vocabulary - 1]]}, rows, vocabulary))
    said = cluster.expected("base+code")
    assert said != cluster.expected("base+math")
    assert until(lambda: cluster.say_everywhere("base+auto") == {said}, 60)


def test_a_replica_whose_engine_has_ended_is_not_healthy(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.address}/health", timeout=20).json() == {"status": "ok"}
    replica = replicas.Replica(cluster.serving)
    replica.check_health()
    replica.engine.close()
    with pytest.raises(EngineFailure):
        replica.check_health()


def test_a_key_stands_for_the_users_adapters_and_does_not_tell_them() -> None:
    def key(model: Any, **more: Any) -> str:
        return forward.affinity(json.dumps({"model": model, **more}).encode(), {"user"})

    ada = key("base+sage+auto+user/ada")
    assert ada and "ada" not in ada and ada == key("org/small+user/ada") == key("base", selection={"user": "ada"})
    assert ada != key("base+user/ben") and ada != key("base+user/ada+user/ben")
    assert key("base+auto") == key("base+domain/ada") == key("base+user/ada", selection={"user": None}) == ""
    assert key(7) == key("base", selection=[1]) == forward.affinity(b"[" * 9999, {"user"}) == ""


def test_numbers_of_replicas_and_stores_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        replicas.Serving("here", replicas=3, most_replicas=2)
    model = make_spoken(tmp_path)
    del model.stack.layers[1]
    with pytest.raises(ConfigError, match="shared"):
        replicas.application(replicas.Serving(str(save_spoken(model, tmp_path)), store="s"))


def test_the_command_hands_on_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(command, "KEYS_FILE", tmp_path / "keys.json")
    monkeypatch.setattr(replicas, "run", lambda *given: told.extend(given))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head")
    app = typer.Typer()
    app.command()(command.serve)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, [str(tmp_path), *arguments])

    assert run("--ray", "--most-replicas", "4", "--rows", "3", "--store", "s3://b", "--live", "9").exception is None
    assert told[1:] == ["127.0.0.1", 8000, "ray://head"]
    wanted = replicas.Serving(str(tmp_path), rows=3, store="s3://b", live=9, most_replicas=4)
    assert told[0] == replace(wanted, hosts=("127.0.0.1", "127.0.0.1", "localhost"))
    assert isinstance(run("--ray", "--host", "0.0.0.0").exception, ConfigError)
    assert isinstance(run("--replicas", "2").exception, ConfigError)
    monkeypatch.delitem(sys.modules, "molora.serve.replicas")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "molora[ray]" in str(run("--ray").exception)


def test_autoscaling_follows_the_rows(tmp_path: Path) -> None:
    folder = str(save_spoken(make_spoken(tmp_path), tmp_path))
    app = replicas.application(replicas.Serving(folder, rows=4, replicas=1, most_replicas=5))
    engine = app._bound_deployment.init_args[0]._bound_deployment
    wanted = engine._deployment_config.autoscaling_config
    assert (wanted.min_replicas, wanted.max_replicas, wanted.target_ongoing_requests) == (1, 5, 4)
