"""``molora serve``: keys are made, a door without a lock stays shut, and a saved stack is served."""

import sys

import pytest
import typer
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from molora.commands import serve as command
from molora.errors import ConfigError
from molora.serve.keys import Keys
from tests.unit.spoken import make_spoken, save_spoken

app = typer.Typer()
app.command()(command.serve)


@pytest.fixture(autouse=True)
def keys_file(tmp_path, monkeypatch):
    file = tmp_path / "home" / "keys.json"
    monkeypatch.setattr(command, "KEYS_FILE", file)
    return file


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_key_is_made_and_shown_once(keys_file, tmp_path):
    token = run("--new-key", "app", "--scope", "use", "--scope", "manage", "--user", "ada").stdout.strip()
    found = Keys(keys_file).find(token)
    assert (found.scopes, found.user) == (("use", "manage"), "ada")
    other = tmp_path / "other.json"
    token = run("--new-key", "app", "--keys", other).stdout.strip()
    assert Keys(other).find(token).scopes == ("use",)


def test_keys_are_listed_and_taken_away(keys_file):
    token = run("--new-key", "app").stdout.strip()
    run("--new-key", "ada", "--user", "ada")
    assert run("--list-keys").stdout.split() == ["app", "ada"]
    serving = Keys(keys_file)
    assert run("--revoke-key", "app").stdout == "The key app is taken away.\n"
    assert serving.find(token) is None and run("--list-keys").stdout.split() == ["ada"]
    before = keys_file.read_bytes()
    error = run("--revoke-key", "app").exception
    assert isinstance(error, ConfigError) and "no key 'app'; there are ada" in str(error)
    assert keys_file.read_bytes() == before


def test_without_a_file_there_is_no_key_to_take_away(keys_file):
    for asked in (["--list-keys"], ["--revoke-key", "app"]):
        error = run(*asked).exception
        assert isinstance(error, ConfigError) and f"no file {keys_file}" in str(error) and "--new-key" in str(error)
    assert not keys_file.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "lets other machines in"),
        (["--host", "::"], "lets other machines in"),
        (["--host", "example.org"], "lets other machines in"),
        (["--keys", "nowhere.json"], "no file nowhere.json"),
        (["--scope", "use"], "--new-key"),
        (["--new-key", "a", "--scope", "root"], "scopes out of"),
        (["--revoke-key", "a", "--scope", "use"], "of a new key"),
        (["--revoke-key", "a", "--list-keys"], "Give one of"),
        (["--new-key", "a", "--revoke-key", "b"], "Give one of"),
        (["--tensor-parallel", "2"], "give --engine vllm, too"),
        (["--engine", "vllm", "--store", "x", "--replicas", "2"], "vLLM's server has no --store, --replicas"),
        (["--engine", "vllm", "--host", "0.0.0.0"], "set VLLM_API_KEY, or listen on 127.0.0.1"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments, says):
    error = run(*arguments).exception
    assert isinstance(error, ConfigError) and says in str(error)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "molora[serve]" in str(run().exception)


def test_a_saved_stack_is_served(tmp_path, monkeypatch):
    folder = save_spoken(make_spoken(tmp_path), tmp_path)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    told = {}

    def ask(app, host, port, **settings):
        told["at"] = (host, port)
        with TestClient(app, base_url="http://127.0.0.1:9000") as client:
            for name in ("base", "base+math", "base+auto"):
                told[name] = client.post("/v1/chat/completions", json={"model": name, "routes": True, **asked})
            told["metrics"] = client.get("/metrics").text

    monkeypatch.setattr("uvicorn.run", ask)
    result = run(folder, "--port", 9000, "--rows", 2, "--longest", 100, "--dtype", "float32")
    assert result.exception is None and told["at"] == ("127.0.0.1", 9000)
    for name, mark in (("base", None), ("base+math", "math")):
        reply = told[name].json()
        assert reply["usage"]["completion_tokens"] == 4 and reply["choices"][0]["finish_reason"] == "length"
        acted = {adapter for routes in reply["choices"][0]["routes"] for layer, adapter, _ in routes}
        assert (mark in acted) if mark else acted <= {None}
    assert told["base+auto"].status_code == 200
    assert "molora_generated_tokens_total 12.0" in told["metrics"] and "molora_rows 2.0" in told["metrics"]
