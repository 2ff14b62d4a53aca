"""The whole server over the real engine: the official client, adapters from a store, changes while it answers."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers

from molora import MoLoRAModel
from molora.errors import StoreError
from molora.serve.app import build_app
from molora.serve.engine import Engine
from molora.serve.keys import Keys
from molora.serve.pool import Pool
from molora.serve.store import AdapterStore
from tests.conftest import SMALL, write_adapter
from tests.serve.live import serving
from tests.unit.spoken import make_spoken

FILES = ("adapter_config.json", "adapter_model.safetensors")
CHAT: Any = {"messages": [{"role": "user", "content": "Hello there"}], "temperature": 0, "max_tokens": 12}


class Server:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.model: MoLoRAModel = make_spoken(root / "spoken")
        self.store = AdapterStore(root / "store")
        self.engine = Engine(
            self.model, rows=4, longest=200, pools=[Pool(self.model, "user", self.store.finder("user"), most=2)]
        )
        keys = Keys(root / "keys.json")
        self.boss = keys.create("boss", ["use", "manage"])
        self.ada = keys.create("ada", ["use"], "ada")
        self.app = build_app(self.engine, keys=keys, store=self.store)
        self.address = ""

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)

    def say(self, model: str, key: str | None = None, **more: Any) -> str:
        answer = self.client(key or self.boss).chat.completions.create(model=model, **CHAT, **more)
        return answer.choices[0].message.content or ""

    def upload(self, place: str, folder: Path) -> int:
        parts = [("files", (name, (folder / name).read_bytes())) for name in FILES]
        return self.manage("POST", place, files=parts).status_code

    def manage(self, method: str, place: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.boss}"}
        return httpx.request(method, f"{self.address}/v1/adapters/{place}", headers=headers, timeout=60, **more)

    def adapter(self, seed: int) -> Path:
        """Loud enough to be heard in every answer."""
        return write_adapter(transformers.LlamaForCausalLM(self.model.config), self.root / f"adapter-{seed}", seed)

    def expected(self, folder: Path | None) -> str:
        """What the model itself says with an adapter of the user alone."""
        if folder is not None:
            self.model.add_adapter("user", "now", folder)
        inputs = self.model.encode(CHAT["messages"])
        selection = {"domain": None, "user": "now" if folder is not None else None}
        found = self.model.generate(**inputs, selection=selection, max_new_tokens=12, do_sample=False)
        if folder is not None:
            self.model.remove_adapter("user", "now")
        return str(self.model.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.engine.start()
    with serving(made.app) as made.address:
        yield made
    made.engine.close()
    made.store.close()


def test_an_upload_for_a_user_is_stored_and_served(server: Server) -> None:
    folders = {f"u{n}": server.adapter(30 + n) for n in range(4)}
    for name, folder in folders.items():
        assert server.upload(f"user/{name}", folder) == 201
    assert server.manage("GET", "user?limit=3").json()["data"] == ["u0", "u1", "u2"]
    assert server.manage("GET", "user?after=u2").json()["data"] == ["u3"]
    said = {name: server.say(f"base+user/{name}") for name in folders}  # twice as many as are live at once
    assert said == {name: server.expected(folder) for name, folder in folders.items()}
    assert len(set(said.values())) == 4 and server.say("base") == server.expected(None)
    counts = httpx.get(f"{server.address}/metrics").text
    assert 'molora_live_adapters{layer="user"} 2.0' in counts
    assert 'molora_adapters_total{at="read",layer="user"} 4.0' in counts
    assert 'molora_adapters_total{at="live",layer="user"} 0.0' in counts
    assert 'molora_adapters_total{at="host",layer="user"} 4.0' in counts
    assert 'molora_adapter_evictions_total{at="live",layer="user"} 2.0' in counts
    assert 'molora_adapter_evictions_total{at="host",layer="user"} 0.0' in counts
    assert "molora_store_evictions_total 0.0" in counts


def test_another_version_serves_from_the_next_request_on(server: Server) -> None:
    old, new = server.adapter(40), server.adapter(41)
    server.upload("user/eve", old)
    assert server.say("base+user/eve") == server.expected(old)
    server.upload("user/eve", new)
    assert server.say("base+user/eve") == server.expected(new)
    server.store.roll_back("user", "eve")  # as another process on this machine might
    assert server.say("base+user/eve") == server.expected(old)
    assert server.manage("DELETE", "user/eve").status_code == 204
    with pytest.raises(openai.NotFoundError):
        server.say("base+user/eve")


def test_a_users_key_finds_its_own_alone(server: Server) -> None:
    own = server.adapter(50)
    server.upload("user/ada", own)
    server.upload("user/bob", server.adapter(51))
    assert server.say("base+user/ada", server.ada) == server.expected(own)
    bodies = []
    for name in ("bob", "nobody"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.say(f"base+user/{name}", server.ada)
        bodies.append(str(caught.value.body).replace(name, "NAME"))
    assert bodies[0] == bodies[1]
    with pytest.raises(openai.PermissionDeniedError):
        server.client(server.ada).get("/adapters/user", cast_to=object)


def test_a_pinned_adapter_stays_in_the_model(server: Server) -> None:
    for number in range(3):
        server.upload(f"user/p{number}", server.adapter(60 + number))
    assert server.manage("PUT", "user/p0/pin").status_code == 204
    assert server.manage("GET", "user?pinned=true").json()["data"] == ["p0"]
    assert 'molora_pinned_adapters{layer="user"} 1.0' in httpx.get(f"{server.address}/metrics").text
    for number in (1, 2, 0):
        server.say(f"base+user/p{number}")
    assert server.manage("PUT", "user/p1/pin").status_code == 400  # of two that are live one stays free
    assert server.store.pinned("user") == ["p0"]  # the one that was refused is not noted
    assert server.manage("PUT", "user/nobody/pin").status_code == 404
    assert server.manage("PUT", "domain/math/pin").status_code == 400
    assert server.manage("PUT", "nothing/p0/pin").status_code == 404
    assert server.manage("DELETE", "user/p0/pin").status_code == 204
    assert server.manage("DELETE", "user/p0/pin").status_code == 404
    assert server.manage("GET", "user?pinned=true").json()["data"] == []


def test_what_does_not_fit_is_not_stored(server: Server, tmp_path: Path) -> None:
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 64}))
    assert server.upload("user/wide", write_adapter(other, tmp_path / "wide", 1)) == 400
    assert "wide" not in server.manage("GET", "user").json()["data"]


def test_what_the_store_does_not_have_is_404_and_where_it_is_is_told_to_nobody(server: Server, tmp_path: Path) -> None:
    missing = server.manage("DELETE", "user/nobody")
    assert missing.status_code == 404 and "store" not in missing.text
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "hidden_size": 64}))
    server.store.put("user", "wrong", write_adapter(other, tmp_path / "wide", 1))  # past the server
    wrong = server.manage("PUT", "user/wrong/pin")
    assert wrong.status_code == 400 and "user/wrong" in wrong.text and str(server.root) not in wrong.text
    assert server.manage("DELETE", "user/wrong").status_code == 204


def test_a_store_that_fails_is_no_mistake_of_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise StoreError("The store s3://a-bucket does not answer.")

    for method in ("get", "put", "remove", "pinned"):
        monkeypatch.setattr(server.store, method, fail)
    parts = [("files", (name, (server.adapter(30) / name).read_bytes())) for name in FILES]
    for answer in (
        server.manage("GET", "user?pinned=true"),
        server.manage("DELETE", "user/u0"),
        server.manage("PUT", "user/u0/pin"),
        server.manage("POST", "user/u0", files=parts),
    ):
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "store_unavailable"
        assert "bucket" not in answer.text
    assert caplog.text.count("s3://a-bucket does not answer") == 4


def test_names_are_listed_while_adapters_come_and_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, adapters = server.engine.pools["user"], server.model.stack["user"].adapters
    owns, came = pool.owns, "came-meanwhile"
    monkeypatch.setattr(pool, "owns", lambda name: bool(adapters.update({came: "x"})) or owns(name))
    monkeypatch.setitem(adapters, "own", "x")
    try:
        assert "own" in server.manage("GET", "user").json()["data"]
    finally:
        adapters.pop(came)


def test_streams_say_what_whole_answers_say(server: Server) -> None:
    chunks = list(
        server.client(server.boss).chat.completions.create(
            model="molora", stream=True, stream_options={"include_usage": True}, extra_body={"routes": True}, **CHAT
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == server.say("molora")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    routes = [chunk.model_extra["routes"] for chunk in chunks if (chunk.model_extra or {}).get("routes")]
    assert len(routes) == 12
    for domain, user in routes:
        assert domain[0] == "domain" and domain[1] in ("math", "code", None) and user == ["user", None, 0.0]


def test_adapters_change_while_many_ask(server: Server) -> None:
    """Each answer is of one version, never of a mixture."""
    versions = [server.adapter(60 + n) for n in range(3)]
    rights = {server.expected(folder) for folder in versions}
    server.upload("user/kim", versions[0])
    wrong: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            said = server.say("base+user/kim")
            if said not in rights:
                wrong.append(said)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for turn in range(12):
        assert server.upload("user/kim", versions[(turn + 1) % 3]) == 201
    ended.set()
    for asker in askers:
        asker.join(60)
    assert not wrong and len(rights) == 3
