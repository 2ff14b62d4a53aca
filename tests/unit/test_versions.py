"""Versions of a saved MoLoRA: what serves, what may not, the way back, and what a kill leaves."""

import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from molora import Adapter, MoLoRAModel, Router, VocabularyRouter
from molora.atomic import PARTIAL
from molora.cli import app
from molora.errors import AdapterError, RouterError, StackError, VersionError
from molora.saved import MANIFEST, load
from molora.selection import router_rows
from molora.versions import ABOUT, Versions
from tests.conftest import write_adapter
from tests.parity.test_equalities import make_routed

KILLS = 200


@pytest.fixture
def folder(base: Any, adapters: dict[str, Path], tmp_path: Path) -> Path:
    make_routed(base, adapters).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def newer(base: Any, tmp_path: Path) -> Path:
    write_adapter(copy.deepcopy(base), tmp_path / "newer", 77)
    return tmp_path / "newer"


@torch.no_grad()
def logits(folder: Path, base: Any, ids: torch.Tensor, **selection: Any) -> torch.Tensor:
    model = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    chosen = {layer.name: None for layer in model.stack.layers} | selection
    return model(ids, selection=chosen).logits


def test_a_promoted_version_serves_and_the_one_before_comes_back(
    folder: Path, newer: Path, base: Any, ids: torch.Tensor
) -> None:
    before = logits(folder, base, ids, domain="math")
    mine = Versions(folder, "domain", "math")
    assert mine.current is None and mine.all() == []
    new = mine.add(newer, command="molora update", data={"sha256": "00"}, metrics={"loss": 1.5}, why="better")
    assert [one.number for one in mine.all()] == [1, 2] and new == mine[2] and new.parent == 1
    assert mine.current is None and torch.equal(logits(folder, base, ids, domain="math"), before)
    mine.promote(2)
    alone = make_routed(copy.deepcopy(base), {**served(folder), "math": newer})
    with torch.no_grad():
        expected = alone(ids, selection={"personality": None, "domain": "math", "user": None}).logits
    assert mine.current == 2 and torch.equal(logits(folder, base, ids, domain="math"), expected)
    assert mine.add(newer).parent == 2
    assert mine.rollback() == 1 and torch.equal(logits(folder, base, ids, domain="math"), before)
    assert mine.rollback(2) == 2 and torch.equal(logits(folder, base, ids, domain="math"), expected)
    assert json.loads((mine.path(2) / ABOUT).read_text())["metrics"] == {"loss": 1.5}


def served(folder: Path) -> dict[str, Path]:
    return {name: Path(path) for layer in load(folder).stack.layers for name, path in layer.adapters.items()}


def test_what_failed_its_gate_never_serves(folder: Path, newer: Path) -> None:
    mine = Versions(folder, "domain", "math")
    failed = mine.add(newer, passed=False, why="it forgot 3%")
    before = (folder / MANIFEST).read_bytes()
    for attempt in (mine.promote, mine.rollback):
        with pytest.raises(VersionError, match="it forgot 3%"):
            attempt(failed.number)
    assert (folder / MANIFEST).read_bytes() == before and mine.current is None


def test_the_routers_versions(folder: Path, base: Any, ids: torch.Tensor) -> None:
    before = logits(folder, base, ids, domain="auto")
    mine, router = Versions(folder), load(folder).router
    assert isinstance(router, Router)
    with torch.no_grad():
        for part in router.parts:
            part.output.bias[router.rows.index("domain/code")] += 100
    mine.promote(mine.add(router).number)
    after = logits(folder, base, ids, domain="auto")
    assert torch.equal(after, logits(folder, base, ids, domain="code")) and not torch.equal(after, before)
    assert mine.rollback() == 1 and torch.equal(logits(folder, base, ids, domain="auto"), before)
    router.add_row("domain/other")
    stranger = mine.add(router)
    with pytest.raises(VersionError, match="domain/other"):
        mine.promote(stranger.number)


def test_a_new_users_adapter_is_version_one(folder: Path, newer: Path, base: Any, ids: torch.Tensor) -> None:
    mine = Versions(folder, "user", "bob")
    mine.promote(mine.add(newer).number)
    assert mine.current == 1 and mine[1].parent is None
    found = logits(folder, base, ids, user="bob")
    assert torch.equal(found, logits(folder, base, ids, user="bob")) and "bob" in load(folder).stack["user"].adapters
    with pytest.raises(VersionError, match="the first"):
        mine.rollback()
    with pytest.raises(VersionError, match="no row for domain/bob"):  # the router cannot choose it
        stranger = Versions(folder, "domain", "bob")
        stranger.promote(stranger.add(newer).number)


def test_old_versions_go_and_what_is_needed_stays(folder: Path, newer: Path) -> None:
    mine = Versions(folder, "domain", "math")
    for _ in range(3):
        mine.promote(mine.add(newer).number)  # 2, 3 and 4, in a line from 1
    for _ in range(3):
        mine.add(newer, passed=False)  # 5 to 7, of which none serves
    (mine.path(1).parent / f"{PARTIAL}left").mkdir()
    assert mine.collect(keep=2) == [2, 5] and [one.number for one in mine.all()] == [1, 3, 4, 6, 7]
    assert mine.rollback() == 3 and not list(folder.rglob(f"{PARTIAL}*"))
    assert mine.add(newer).number == 8
    with pytest.raises(VersionError, match="no version 2 of domain/math; there are: 1, 3, 4, 6, 7, 8"):
        mine.promote(2)


def test_versions_are_not_saved_over(folder: Path, newer: Path, base: Any) -> None:
    model = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    model.save_pretrained(folder)
    Versions(folder, "domain", "math").add(newer)
    with pytest.raises(StackError, match="holds versions"):
        model.save_pretrained(folder)
    assert len(Versions(folder, "domain", "math").all()) == 2


@pytest.mark.parametrize(("layer", "name"), [("domain", "math"), ("user", "ada")])
def test_what_is_erased_is_gone(layer: str, name: str, folder: Path, newer: Path, base: Any, ids: torch.Tensor) -> None:
    live = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    mine, routers = Versions(folder, layer, name), Versions(folder)
    mine.promote(mine.add(newer).number)
    router = load(folder).router
    assert isinstance(router, Router)
    routers.promote(routers.add(router).number)
    (folder / mine.place / "memory.jsonl").write_text("what was said")
    mine.erase()
    assert not (folder / mine.place).exists() and not (folder / "adapters" / layer / name).exists()
    row = f"{layer}/{name}"
    assert all(row not in version.router["rows"] for version in routers.all() if version.router)
    assert not (folder / "router.safetensors").exists()
    live.remove_adapter(layer, name)
    found = MoLoRAModel.from_pretrained(folder, base=copy.deepcopy(base))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, live(ids).logits) and row not in found.stack.names
    with pytest.raises(VersionError, match=f"nothing of {row}"):
        mine.erase()
    (folder / mine.place).mkdir(parents=True)  # as an interruption leaves it
    mine.erase()
    assert not (folder / mine.place).exists()
    with pytest.raises(VersionError, match="router cannot be erased"):
        routers.erase()


def test_what_rules_choose_is_not_erased(base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = make_routed(base, adapters)
    model.set_router(VocabularyRouter({"domain/math": [3]}, router_rows(model.stack), 97))
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / MANIFEST).read_bytes()
    with pytest.raises(VersionError, match="Rules about words choose domain/math"):
        Versions(tmp_path / "model", "domain", "math").erase()
    assert (tmp_path / "model" / MANIFEST).read_bytes() == before and "domain/math" in load(
        tmp_path / "model"
    ).stack.names


def math(folder: Path) -> Versions:
    return Versions(folder, "domain", "math")


BAD: dict[str, tuple[type[Exception], str, Callable[[Path, Path], Any]]] = {
    "a path for a name": (StackError, "cannot name", lambda model, newer: Versions(model, "domain", "../math")),
    "half a name": (VersionError, "or neither", lambda model, newer: Versions(model, "domain")),
    "no model": (StackError, "not a saved MoLoRA", lambda model, newer: Versions(newer)),
    "no layer": (
        VersionError,
        "no layer 'city'",
        lambda model, newer: promoted(Versions(model, "city", "rome"), newer),
    ),
    "no adapter": (AdapterError, "adapter_config.json", lambda model, newer: math(model).add(model)),
    "an adapter for a router": (VersionError, "are routers", lambda model, newer: Versions(model).add(newer)),
    "nothing to go back to": (VersionError, "as it was saved", lambda model, newer: Versions(model).rollback()),
    "a damaged record": (VersionError, "damaged", lambda model, newer: damaged(math(model), newer)),
}


def promoted(mine: Versions, source: Path) -> None:
    mine.promote(mine.add(source).number)


def damaged(mine: Versions, source: Path) -> None:
    number = mine.add(source).number
    (mine.path(number) / ABOUT).write_text("{")
    mine.promote(number)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_change_nothing(name: str, folder: Path, newer: Path) -> None:
    error, sentence, request = BAD[name]
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(error, match=sentence):
        request(folder, newer)
    assert (folder / MANIFEST).read_bytes() == before and not list(folder.rglob(f"{PARTIAL}*"))


def test_a_routers_file_is_no_path_to_elsewhere(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for file in ("../router.safetensors", "versions/router/../../x/router.safetensors", 3):
        manifest["router"]["file"] = file
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(RouterError, match="one of its versions"):
            load(folder)


def test_the_commands(folder: Path, newer: Path) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--model", str(folder)], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert "no versions" in run("versions", "domain", "math")
    mine = Versions(folder, "domain", "math")
    promoted(mine, newer)
    mine.add(newer, passed=False, why="it forgot 3%")
    lines = run("versions", "domain", "math").splitlines()
    assert len(lines) == 3 and "serves" in lines[1] and "from 1" in lines[1] and "it forgot 3%" in lines[2]
    assert run("rollback", "domain", "math") == "Version 1 of domain/math serves.\n"
    record = json.loads(run("versions", "domain", "math", "--json"))
    assert record["current"] == 1 and [one["number"] for one in record["versions"]] == [1, 2, 3]
    assert "no versions" in run("versions", "router")
    with pytest.raises(VersionError, match="Name an adapter"):
        run("versions", "domain")


def test_a_kill_at_any_moment_loses_nothing(folder: Path, newer: Path, adapters: dict[str, Path]) -> None:
    """A process that makes, promotes, takes back and collects versions is killed again and again at a random moment."""
    mine, chance = Versions(folder, "domain", "math"), random.Random(0)
    made = 0
    for _ in range(KILLS):
        before = mine.current
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _work(mine, [newer, adapters["math"]], writing)
        os.close(writing)
        heard, wanted = b"", chance.randrange(6)
        while heard.count(b"\n") < wanted:
            heard += os.read(reading, 64)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as told:
            said = [line.split() for line in (heard + told.read()).decode().splitlines()]
        every = mine.all()  # each is whole
        for version in every:
            Adapter.load(mine.path(version.number))
        serving = Path(str(load(folder).stack["domain"].adapters["math"]))
        Adapter.load(serving)
        assert mine.current is None or mine[mine.current].passed
        numbers = [int(number) for what, number in said if what == "made"]
        assert not numbers or numbers[-1] in [version.number for version in every]
        # What was last said to serve does, or what the change under way when it died makes serve.
        last = next((int(number) for what, number in reversed(said) if what == "serves"), before)
        under_way = {version.parent for version in every if version.number == last} | {v.number for v in every[-1:]}
        assert mine.current in {last, *under_way}
        made += len(numbers)
    assert made > KILLS / 4  # it did get to work
    mine.collect(keep=1)
    assert not list(folder.rglob(f"{PARTIAL}*"))


def _work(mine: Versions, sources: list[Path], told: int) -> None:
    turn = 0
    while True:
        new = mine.add(sources[turn % 2], passed=turn % 3 != 2)
        os.write(told, f"made {new.number}\n".encode())
        if new.passed:
            mine.promote(new.number)
            os.write(told, f"serves {new.number}\n".encode())
        serving = mine.current
        if turn % 4 == 3 and serving is not None and mine[serving].parent in [version.number for version in mine.all()]:
            os.write(told, f"serves {mine.rollback()}\n".encode())
        mine.collect(keep=2)
        turn += 1


def test_what_a_version_says_of_itself_is_all_that_is_kept(folder: Path, newer: Path) -> None:
    mine = Versions(folder, "domain", "math")
    new = mine.add(newer, data={"sha256": "ab", "examples": 3})
    files = {file.name for file in mine.path(2).iterdir()}
    assert files - {"README.md"} == {ABOUT, "adapter_config.json", "adapter_model.safetensors"}
    assert replace(new, data={}) != new and mine[2].data == {"sha256": "ab", "examples": 3}
