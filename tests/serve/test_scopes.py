"""Who may do what on the HTTP server, and what nobody is told."""

import json
import logging

import pytest

from molora.serve.keys import Keys
from tests.serve.asking import chat, client_of, error_of
from tests.serve.fake_engine import FakeEngine


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys.json")


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_without_a_known_key_nothing_is_read(keys):
    client = client_of(keys=keys, most_body=10**6)
    for headers in ({}, bearer("molora-wrong"), {"Authorization": "Basic abc"}, {"Authorization": "é".encode()}):
        response = client.post("/v1/chat/completions", content=b"{", headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    error_of(client.get("/v1/models"), 401)
    assert client.get("/health").status_code == 200


def test_without_keys_a_page_cannot_ask_under_a_name_of_its_own():
    client = client_of(hosts=["127.0.0.1", "localhost", "::1"])
    for host in ("localhost:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        assert "127.0.0.1" in error_of(client.get("/v1/models", headers={"Host": host}), 400)["message"]


def test_scopes(keys):
    use, manage = keys.create("app", ["use"]), keys.create("boss", ["manage"])
    client = client_of(keys=keys)
    assert chat(client, headers=bearer(use)).status_code == 200
    assert "scope 'use'" in error_of(chat(client, headers=bearer(manage)), 403)["message"]
    assert client.get("/v1/adapters", headers=bearer(manage)).status_code == 200
    error_of(client.get("/v1/adapters", headers=bearer(use)), 403)
    assert "--new-key" in error_of(client_of().get("/v1/adapters"), 403)["message"]
    keys.revoke("app")
    error_of(chat(client, headers=bearer(use)), 401)


def test_a_users_key_is_told_of_its_own_adapter_alone(keys):
    engine = FakeEngine()
    engine.model.stack["user"].default = "ben"
    client = client_of(engine, keys=keys)
    for user, names, default in (("ada", ["ada"], None), ("ben", ["ben"], "ben"), ("eve", [], None)):
        told = client.get("/v1/stack", headers=bearer(keys.create(user, ["use"], user=user))).json()["layers"][2]
        assert (told["adapters"], told["default"]) == (names, default)
    error_of(client.get("/v1/stack"), 401)


@pytest.mark.parametrize(
    "fields", [{"model": "base+user/NAME"}, {"model": "base+NAME"}, {"selection": {"user": "NAME"}}]
)
def test_a_users_key_cannot_tell_another_user_from_nobody(keys, fields):
    headers = bearer(keys.create("ada-phone", ["use"], user="ada"))
    engine = FakeEngine()
    client = client_of(engine, keys=keys)

    def ask(name):
        return chat(client, headers=headers, **json.loads(json.dumps(fields).replace("NAME", name)))

    other, nobody, own = ask("ben"), ask("eve"), ask("ada")
    assert other.status_code == nobody.status_code == 404 and own.status_code == 200
    assert other.content.replace(b"ben", b"eve") == nobody.content
    assert engine.requests[0].selection["user"] == "ada" and engine.requests[0].user == "ada-phone"
    found = [client.get(f"/v1/models/base+user/{name}", headers=headers) for name in ("ben", "eve")]
    assert found[0].content.replace(b"ben", b"eve") == found[1].content


def test_keys_are_in_no_log(keys, caplog):
    token = keys.create("app", ["use"])
    with caplog.at_level(logging.DEBUG):
        client = client_of(FakeEngine(ending="error"), keys=keys)
        chat(client, headers=bearer(token))
        chat(client, headers=bearer("molora-unknown"))
    assert token not in caplog.text and "molora-unknown" not in caplog.text


def test_a_damaged_file_of_keys_lets_nobody_in(keys):
    headers = bearer(keys.create("app", ["use"]))
    client = client_of(keys=keys)
    keys.file.write_text("{")
    error = error_of(chat(client, headers=headers), 503)
    assert str(keys.file) not in error["message"]
