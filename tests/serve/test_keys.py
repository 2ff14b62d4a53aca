"""Keys in a file: shown once, hashed at rest, private, taken away while a server runs."""

import json
import stat

import pytest

from molora.errors import ConfigError, StackError
from molora.serve.keys import Keys


def test_a_token_is_found_and_kept_nowhere(tmp_path):
    keys = Keys(tmp_path / "a" / "keys.json")
    token = keys.create("app", ["use", "manage"], user="ada")
    found = keys.find(token)
    assert (found.name, found.scopes, found.user) == ("app", ("use", "manage"), "ada")
    assert token not in keys.file.read_text() and len(token) > 40
    assert keys.find(token[:-1]) is None and keys.find("") is None and keys.find("é\ud800") is None


def test_the_file_is_its_owners_alone(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    keys.create("one", ["use"])
    keys.create("two", ["use"])
    assert stat.S_IMODE(keys.file.stat().st_mode) == 0o600
    assert keys.names() == ["one", "two"] == Keys(keys.file).names()


def test_a_running_server_sees_what_changes(tmp_path):
    serving, command = Keys(tmp_path / "keys.json"), Keys(tmp_path / "keys.json")
    token = command.create("app", ["use"])
    assert serving.find(token).name == "app"
    command.revoke("app")
    assert serving.find(token) is None


def test_mistakes_change_nothing(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    keys.create("app", ["use"])
    before = keys.file.read_bytes()
    with pytest.raises(ConfigError, match="'app' already"):
        keys.create("app", ["use"])
    with pytest.raises(ConfigError, match="out of use, manage"):
        keys.create("b", ["root"])
    with pytest.raises(ConfigError, match="out of use, manage"):
        keys.create("b", [])
    with pytest.raises(StackError):
        keys.create("../b", ["use"])
    with pytest.raises(ConfigError, match="no key 'c'; there are app"):
        keys.revoke("c")
    assert keys.file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": [1]}', '{"keys": [{"name": "x"}]}', "[" * 100_000])
def test_a_damaged_file_is_told(tmp_path, text):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ConfigError, match="no file of keys"):
        Keys(tmp_path / "keys.json")


def test_a_key_with_more_in_it_is_refused(tmp_path):
    entry = {"name": "x", "hash": "0", "scopes": ["use"], "user": None, "more": 1}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(ConfigError):
        Keys(tmp_path / "keys.json")
