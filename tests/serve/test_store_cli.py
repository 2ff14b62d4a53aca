"""``molora store``: what each command does to a store, what it prints, and its mistakes in one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE
from molora.cli import app
from molora.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    MoLoRAError,
    NonFiniteError,
    RouterError,
    StackError,
    StoreError,
    VersionError,
)
from molora.serve.store import AdapterStore
from tests.serve.test_store import assert_same, make_folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Four adapters of different content."""
    return [make_folder(tmp_path / "made" / str(seed), seed) for seed in range(4)]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def run(*arguments: str | Path, stdin: str | None = None) -> str:
    """What `molora store` writes to stdout."""
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], input=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def mistake(*arguments: str | Path) -> MoLoRAError:
    """What `molora` makes one sentence and exit code 2 of."""
    error = CliRunner().invoke(app, ["store", *map(str, arguments)]).exception
    assert isinstance(error, MoLoRAError), error
    return error


def put(url: str, label: str, *folders: Path) -> list[str]:
    """Their versions."""
    return [run("put", url, label, folder).strip() for folder in folders]


def serving(url: str, name: str = "ada") -> str:
    store = AdapterStore(url)
    try:
        return store.current("user", name)
    finally:
        store.close()


def test_what_was_put_is_copied_out_again(url: str, folders: list[Path], tmp_path: Path) -> None:
    made = put(url, "user/ada", *folders[:2])
    assert len(set(made)) == 2 and serving(url) == made[1]
    out = tmp_path / "deep" / "out"
    assert run("get", url, "user/ada", "--out", out) == f"Version {made[1]} of user/ada is in {out}.\n"
    assert_same(out, folders[1])
    assert sorted(file.name for file in out.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    run("get", url, "user/ada", "--version", made[0], "--out", tmp_path / "older")
    assert_same(tmp_path / "older", folders[0])
    assert put(url, "user/ada", folders[0]) == [made[0]]  # the same content
    assert serving(url) == made[0]


def test_a_folder_that_is_there_is_not_written_to(url: str, folders: list[Path], tmp_path: Path) -> None:
    put(url, "user/ada", folders[0])
    out = tmp_path / "out"
    out.mkdir()
    error = mistake("get", url, "user/ada", "--out", out)
    assert isinstance(error, ConfigError) and "nothing was written" in str(error) and list(out.iterdir()) == []


def test_a_copy_is_whole_or_not_there(
    url: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(url, "user/ada", folders[0])
    (tmp_path / "file").touch()
    assert "cannot be written" in str(mistake("get", url, "user/ada", "--out", tmp_path / "file" / "out"))

    def fill(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        if target.name == WEIGHTS_FILE:
            raise OSError("No space left on device")

    monkeypatch.setattr("molora.commands.store.shutil.copyfile", fill)
    out = tmp_path / "outs" / "out"
    assert "No space left" in str(mistake("get", url, "user/ada", "--out", out))
    assert list(out.parent.iterdir()) == []


def test_names_are_listed_with_what_serves(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders[:3])
    run("use", url, "user/ada", made[0])
    (ben,) = put(url, "user/ben", folders[3])
    put(url, "domain/math", folders[3])
    size = sum((folders[0] / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE))
    record = json.loads(run("list", url, "user", "--json"))
    assert (record["layer"], record["more"]) == ("user", False)
    ada, other = record["adapters"]
    assert (ada["name"], ada["current"], ada["versions"], ada["bytes"]) == ("ada", made[0], 3, size)
    assert (other["name"], other["current"], other["versions"]) == ("ben", ben, 1)
    assert ada["created"] < other["created"]
    lines = [line.split() for line in run("list", url, "user").splitlines()]
    assert [line[:3] for line in lines] == [
        ["adapter", "serves", "versions"],
        ["ada", made[0], "3"],
        ["ben", ben, "1"],
    ]
    assert ada["created"][:10] in lines[1]


def test_a_list_may_be_narrowed_down(url: str, folders: list[Path]) -> None:
    for name in ("ada", "adam", "ben"):
        put(url, f"user/{name}", folders[0])

    def listed(*options: str) -> tuple[list[str], bool]:
        record = json.loads(run("list", url, "user", *options, "--json"))
        return [one["name"] for one in record["adapters"]], record["more"]

    assert listed("--prefix", "ada") == (["ada", "adam"], False)
    assert listed("--limit", "2") == (["ada", "adam"], True)
    assert listed("--limit", "3") == (["ada", "adam", "ben"], False)
    assert listed("--prefix", "x") == ([], False)
    assert "There are more" in run("list", url, "user", "--limit", "1")
    assert f"molora store reindex {url}" in run("list", url, "domain")


def test_versions_tell_which_one_serves(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders[:3])
    run("use", url, "user/ada", made[1])
    lines = [line.split() for line in run("versions", url, "user/ada").splitlines()]
    assert [line[0] for line in lines] == made
    assert [line[-1] == "serves" for line in lines] == [False, True, False]
    record = json.loads(run("versions", url, "user/ada", "--json"))
    assert record["current"] == made[1] and [one["version"] for one in record["versions"]] == made
    first = record["versions"][0]
    assert first["ranks"] == [2] and first["base"] == "tiny/base"
    assert first["bytes"] == sum(one["bytes"] for one in first["files"].values())


def test_rolling_back_and_forth(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders[:3])
    assert run("rollback", url, "user/ada") == f"Version {made[1]} of user/ada serves.\n" and serving(url) == made[1]
    run("rollback", url, "user/ada")
    assert serving(url) == made[0]
    assert "nothing to go back to" in str(mistake("rollback", url, "user/ada")) and serving(url) == made[0]
    assert run("use", url, "user/ada", made[2]) == f"Version {made[2]} of user/ada serves.\n"
    assert serving(url) == made[2]
    error = mistake("use", url, "user/ada", "0" * 16)
    assert isinstance(error, VersionError) and made[0] in str(error) and serving(url) == made[2]
    assert "16 hexadecimal digits" in str(mistake("use", url, "user/ada", "../x"))


def test_pruning_leaves_the_newest_and_what_serves(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders)
    run("use", url, "user/ada", made[0])
    assert run("prune", url, "user/ada") == f"Deleted: {made[1]}.\n"
    assert run("prune", url, "user/ada", "--keep", "1") == f"Deleted: {made[2]}.\n"
    assert run("prune", url, "user/ada", "--keep", "1") == "Deleted: none.\n"
    left = json.loads(run("versions", url, "user/ada", "--json"))
    assert [one["version"] for one in left["versions"]] == [made[0], made[3]] and left["current"] == made[0]


def test_removing_asks_before(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders[:2])
    for answer in ("n\n", ""):
        result = CliRunner().invoke(app, ["store", "remove", url, "user/ada"], input=answer)
        assert result.exit_code == 1 and f"Delete user/ada from {url}, with 2 versions?" in result.stdout
        assert serving(url) == made[1]
    assert "user/ada is gone." in run("remove", url, "user/ada", stdin="y\n")
    assert isinstance(mistake("versions", url, "user/ada"), AdapterNotFoundError)
    put(url, "user/ada", folders[0])
    assert run("remove", url, "user/ada", "--yes") == "user/ada is gone.\n"
    assert json.loads(run("list", url, "user", "--json"))["adapters"] == []


def test_reindexing_finds_what_others_wrote(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}"
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "mine"))
    other = AdapterStore(url, cache=tmp_path / "other")
    made = [other.put("user", "ada", folder).version for folder in folders[:2]]
    other.put("domain", "math", folders[2])
    other.close()
    assert json.loads(run("list", url, "user", "--json"))["adapters"] == []
    assert run("reindex", url) == "2 names, 3 versions.\n"
    (row,) = json.loads(run("list", url, "user", "--json"))["adapters"]
    assert (row["name"], row["current"], row["versions"]) == ("ada", made[1], 2)
    run("get", url, "user/ada", "--out", tmp_path / "out")
    assert_same(tmp_path / "out", folders[1])
    run("remove", url, "user/ada", "--yes")
    assert run("reindex", url) == "1 name, 1 version.\n"


def test_one_damaged_record_hides_nothing_else(url: str, folders: list[Path]) -> None:
    made = put(url, "user/ada", *folders[:2])
    put(url, "user/ben", folders[2])
    current = Path(url) / "user" / "ada" / "current.json"
    current.write_text("{")
    result = CliRunner().invoke(app, ["store", "list", url, "user", "--json"])
    ada, ben = json.loads(result.stdout)["adapters"]
    assert result.exit_code == 0 and "current.json in" in result.stderr
    assert (ada["name"], ada["current"], ada["versions"], ada["bytes"]) == ("ada", None, 2, None)
    assert ben["current"] is not None
    assert made[0] in run("versions", url, "user/ada") and "damaged" in run("list", url, "user")
    run("use", url, "user/ada", made[0])
    assert serving(url) == made[0]
    weights = Path(url) / "user" / "ada" / made[0] / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert isinstance(mistake("get", url, "user/ada", "--out", Path(url) / "out"), StoreError)
    assert f"{made[0]} was to serve, and is damaged" in run("versions", url, "user/ada")


ON_ONE = (["versions"], ["rollback"], ["remove", "--yes"], ["remove"], ["prune"], ["get", "--out", "out"])


@pytest.mark.parametrize("command", ON_ONE, ids=" ".join)
def test_what_is_not_there_or_no_name_is_told(url: str, folders: list[Path], command: list[str]) -> None:
    (version,) = put(url, "user/ada", folders[0])
    name, *options = command
    unknown = mistake(name, url, "user/nobody", *options)
    assert isinstance(unknown, AdapterNotFoundError) and "user/nobody" in str(unknown)
    unknown = mistake(name, url, "_routers/main", *options)
    assert isinstance(unknown, RouterError) and "no router 'main'" in str(unknown)
    for label in ("user/../x", "../x", "user/", "/ada", "user/none", "user", "_routers/../x", "_routers/", "_routers"):
        assert isinstance(mistake(name, url, label, *options), StackError), label
    nowhere = mistake(name, f"{url}-nowhere", "user/ada", *options)
    assert isinstance(nowhere, StoreError) and "molora store put" in str(nowhere)
    assert serving(url) == version and not Path(f"{url}-nowhere").exists() and not Path("out").exists()


def test_mistakes_of_the_other_commands(url: str, folders: list[Path], tmp_path: Path) -> None:
    assert isinstance(mistake("put", url, "user/../x", folders[0]), StackError)
    assert not Path(url).exists()
    put(url, "user/ada", folders[0])
    before = serving(url)
    assert isinstance(mistake("put", url, "user/ada", tmp_path / "nothing"), AdapterNotFoundError)
    assert isinstance(mistake("put", url, "user/ada", make_folder(tmp_path / "nan", 9, float("nan"))), NonFiniteError)
    (folders[1] / WEIGHTS_FILE).rename(folders[1] / "adapter_model.bin")
    assert isinstance(mistake("put", url, "user/ada", folders[1]), AdapterFormatError)
    assert serving(url) == before
    assert isinstance(mistake("list", url, "../x"), StackError)
    assert isinstance(mistake("use", url, "user/nobody", before), VersionError)
    for command in (["list", f"{url}-nowhere", "user"], ["reindex", f"{url}-nowhere"]):
        assert isinstance(mistake(*command), StoreError) and not Path(f"{url}-nowhere").exists()
    assert isinstance(mistake("list", "nosuch://bucket", "user"), ConfigError)


def test_a_mistake_ends_with_one_sentence(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "molora", "store", "list", url, "user"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"There is no store {url}. Make it with `molora store put`.\n"
