"""Adapters of a running stack by HTTP: uploads that fit, and those that must change nothing."""

import json
import shutil

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from molora.key_file import KEY_FILE, write_key
from molora.serve.app import build_app
from molora.serve.keys import Keys
from molora.stack import StackLayer
from tests.serve.fake_engine import FakeEngine
from tests.unit.spoken import make_spoken

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("spoken")


@pytest.fixture(scope="module")
def model(home):
    return make_spoken(home)


@pytest.fixture
def client(model, tmp_path):
    keys = Keys(tmp_path / "keys.json")
    headers = {"Authorization": f"Bearer {keys.create('boss', ['manage', 'use'])}"}
    app = build_app(FakeEngine(model=model), keys=keys, most_adapter=300_000)
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client
    for layer in model.stack.layers:
        for name in set(layer.adapters) - {"math", "code"}:
            model.remove_adapter(layer.name, name)


def upload(client, folder, place="domain/law", names=FILES):
    parts = [("files", (name, (folder / name).read_bytes())) for name in names]
    return client.post(f"/v1/adapters/{place}", files=parts)


def listed(client):
    return [f"{card['layer']}/{card['name']}" for card in client.get("/v1/adapters").json()["data"]]


def test_an_adapter_comes_changes_and_goes(client, model, home):
    card = upload(client, home / "law")
    assert card.status_code == 201 and card.json()["ranks"] == [4]
    assert listed(client) == ["domain/math", "domain/code", "domain/law"]
    assert client.get("/v1/models/base+law").status_code == 200
    before = model.adapters["domain/law"]
    assert upload(client, home / "math").status_code == 201
    after = model.adapters["domain/law"]
    assert after is not before and after.modules.keys() == before.modules.keys()
    assert client.delete("/v1/adapters/domain/law").status_code == 204
    assert listed(client) == ["domain/math", "domain/code"]
    assert client.delete("/v1/adapters/domain/law").status_code == 404


def test_a_user_gets_one(client, home):
    assert upload(client, home / "law", "user/ada").status_code == 201
    assert client.get("/v1/models/base+user/ada").status_code == 200


def test_a_key_comes_beside_its_adapter(client, model, home):
    key = torch.arange(64.0).view(2, 32)
    write_key(home / "law", key)
    assert upload(client, home / "law", names=(*FILES, KEY_FILE)).status_code == 400  # a layer that has no keys
    model.stack.layers.append(StackLayer("task", {}, keyed=True))
    model._refresh()
    try:
        assert upload(client, home / "law", "task/law", (*FILES, KEY_FILE)).status_code == 201
        assert torch.equal(model.keys.of("task", "law"), key)
        assert upload(client, home / "law", "task/law").status_code == 201  # without one it acts by name
        assert model.keys.of("task", "law") is None
        assert upload(client, home / "law", "task/law", (*FILES, FILES[0])).status_code == 400
        assert client.delete("/v1/adapters/task/law").status_code == 204
    finally:
        (home / "law" / KEY_FILE).unlink()
        model.stack.layers.pop()
        model._refresh()


def _config(folder, **changes):
    file = folder / FILES[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _tensors(folder, change):
    tensors = {name: change(tensor) for name, tensor in load_file(folder / FILES[1]).items()}
    save_file(tensors, folder / FILES[1])


HOSTILE = {
    "nan": lambda folder: _tensors(folder, lambda tensor: tensor * float("nan")),
    "another base": lambda folder: _tensors(folder, lambda tensor: torch.ones(4, 7)),
    "integers": lambda folder: _tensors(folder, lambda tensor: tensor.int()),
    "float8": lambda folder: _tensors(folder, lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "dora": lambda folder: _config(folder, use_dora=True),
    "wrong rank": lambda folder: _config(folder, r=5),
    "endless pattern": lambda folder: _config(folder, rank_pattern={"(a+)+b": 3}),
    "pattern is a list": lambda folder: _config(folder, rank_pattern=["x"]),
    "deep": lambda folder: (folder / FILES[0]).write_text("[" * 100_000),
    "a pickle": lambda folder: (folder / FILES[1]).write_bytes(b"\x80\x04K\x01."),
    "cut": lambda folder: (folder / FILES[1]).write_bytes((folder / FILES[1]).read_bytes()[:-10]),
    "empty": lambda folder: (folder / FILES[1]).write_bytes(b""),
    "header too long": lambda folder: (folder / FILES[1]).write_bytes(b"\xff" * 100),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["domain/law", "domain/math"])
def test_a_hostile_upload_changes_nothing(client, model, home, tmp_path, kind, place):
    folder = shutil.copytree(home / "law", tmp_path / "bad")
    HOSTILE[kind](folder)
    before = dict(model.adapters)
    response = upload(client, folder, place)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"] and "/tmp" not in response.text
    assert model.adapters == before and listed(client) == ["domain/math", "domain/code"]


def test_what_is_too_large_is_refused_while_it_comes(client, model, home, tmp_path):
    folder = shutil.copytree(home / "law", tmp_path / "big")
    (folder / FILES[1]).write_bytes(b"x" * 400_000)
    assert upload(client, folder).status_code == 413
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="f"; filename="adapter_model.safetensors"\r\n\r\n'
    sent = []

    def parts():
        yield start
        for _ in range(8):
            sent.append(1)
            yield b"x" * 100_000

    assert client.post("/v1/adapters/domain/law", content=parts(), headers=boundary).status_code == 413
    assert "domain/law" not in model.adapters


@pytest.mark.parametrize(
    "names", [FILES[:1], (*FILES, "adapter_model.safetensors"), ("adapter_config.json", "adapter_model.bin")]
)
def test_exactly_two_files_are_taken(client, home, tmp_path, names):
    folder = shutil.copytree(home / "law", tmp_path / "other")
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert upload(client, folder, names=names).status_code == 400
    assert listed(client) == ["domain/math", "domain/code"]


@pytest.mark.parametrize(
    ("place", "status"), [("weather/law", 404), ("domain/auto", 400), ("domain/..", 404), ("domain/%2e%2e", 404)]
)
def test_names_are_checked_before_anything_is_read(client, home, place, status):
    assert upload(client, home / "law", place).status_code in (status, 400, 405)
    assert listed(client) == ["domain/math", "domain/code"]


def test_no_form_is_a_400(client):
    assert client.post("/v1/adapters/domain/law", json={"source": "x"}).status_code == 400
    headers = {"content-type": "multipart/form-data"}
    assert client.post("/v1/adapters/domain/law", content=b"x", headers=headers).status_code == 400
