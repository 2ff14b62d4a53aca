"""`molora forget`: it is as if it had never been said, and nothing of it is left on disk."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from molora import MoLoRAModel
from molora.adapter import Adapter
from molora.cli import app
from molora.errors import ConfigError, DataError, VersionError
from molora.saved import load
from molora.versions import Versions
from molora_training.adapter_settings import AdapterTrainSettings
from molora_training.continual import forget as module
from molora_training.continual.forget import forget, speaks_of
from molora_training.continual.memory import Memory, key
from molora_training.continual.update import MEMORY, WORK, Change, UpdateSettings, update
from tests.training.test_update import chats, loss, rows_of, settings

__all__ = ["settings"]
SECRET = "zanzibar"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


@pytest.fixture
def told(settings: UpdateSettings) -> UpdateSettings:
    """After an update with what may stay and one with what is to be forgotten."""
    settings = replace(settings, max_forgetting=100.0)
    assert update(settings).promoted
    secret = chats(settings.data.with_name("secret.jsonl"), SECRET, range(200, 240))
    assert update(replace(settings, data=secret, epochs=30, method="elastic")).promoted
    return replace(settings, data=secret)


def files_with(folder: Path, text: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_it_is_as_if_it_had_never_been_said(told: UpdateSettings) -> None:
    mine = Versions(told.model, "domain", "math")
    secrets = rows_of(told.data)
    root, served = (loss(told, mine.path(number), secrets) for number in (1, 3))
    assert files_with(told.model, SECRET)
    found = forget(told, SECRET.upper(), command="molora forget")
    assert (found.version, found.removed, mine.current, found.gone) == (4, (2, 3), 4, 40)
    assert [one.number for one in mine.all()] == [1, 4] and mine[4].parent == 1
    now = loss(told, mine.path(4), secrets)
    assert found.before.before == pytest.approx(root, rel=1e-3) == found.after.before
    assert found.before.after == pytest.approx(served, rel=1e-3) and found.after.after == pytest.approx(now, rel=1e-3)
    assert served < root - 0.3 and now > served + 0.3
    assert found.left == pytest.approx((root - now) / (root - served), abs=0.01) and found.left < 0.3
    assert not files_with(told.model, SECRET)
    memory = Memory.load(told.model / mine.place / MEMORY)
    assert found.still == len(memory.rows) == 40 and not {key(row) for row in memory.rows} & set(map(key, secrets))
    assert not list((told.model / mine.place).glob("*.safetensors"))
    MoLoRAModel.from_pretrained(told.model)
    with pytest.raises(DataError, match="Nothing that is remembered for domain/math speaks of 'zanzibar'"):
        forget(told, SECRET)


def test_what_still_is_known_was_learnt_anew(told: UpdateSettings) -> None:
    mine = Versions(told.model, "domain", "math")
    rest = rows_of(told.data.with_name("may.jsonl"))
    root = loss(told, mine.path(1), rest)
    forget(told)  # by the file
    assert loss(told, mine.path(4), rest) < root - 0.2


def test_with_nothing_else_remembered_the_first_version_serves_again(told: UpdateSettings, tmp_path: Path) -> None:
    mine = Versions(told.model, "domain", "math")
    everything = tmp_path / "everything.jsonl"
    rows = Memory.load(told.model / mine.place / MEMORY).rows
    everything.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = forget(replace(told, data=everything))
    assert found.still == 0 and found.after.growth == 0 and found.left == 0
    weights = [mine.path(number) / "adapter_model.safetensors" for number in (1, found.version)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def killed_before_its_change(number: int, work: Callable[[], object]) -> bool:
    """Does ``work`` in a process that is killed just before its change ``number`` of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = [number]

        def count(event: str, told: tuple[object, ...]) -> None:
            writes = event == "open" and isinstance(told[2], int) and told[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or event in CHANGES:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0 if left[0] >= 0 else 1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


def test_killed_at_any_moment_it_can_be_done_again(
    told: UpdateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What serves is always whole; and as long as something of it is left, it is remembered and found again."""

    def train(how: AdapterTrainSettings, **_: object) -> None:
        shutil.copytree(tmp_path / "adapters" / "code", how.out)

    monkeypatch.setattr(module.adapter, "train", train)
    monkeypatch.setattr(module, "Judge", lambda *_: lambda rows: Change(len(rows), 1.0, 2.0, 1.0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # of which nobody takes care after a kill
    (tmp_path / "temporary").mkdir()
    whole, mine = tmp_path / "whole", Versions(told.model, "domain", "math")
    shutil.copytree(told.model, whole)
    outcomes, killed = [], True
    while killed:
        shutil.rmtree(told.model)
        shutil.copytree(whole, told.model)
        killed = killed_before_its_change(len(outcomes), lambda: forget(told, SECRET))
        Adapter.load(Path(str(load(told.model).stack["domain"].adapters["math"])))
        remembered = any(speaks_of(row, SECRET) for row in Memory.load(told.model / mine.place / MEMORY).rows)
        outcomes.append((mine.current, remembered))
        if remembered:
            forget(told, SECRET)
        assert not files_with(told.model, SECRET) and {1, mine.current} == {one.number for one in mine.all()}
        assert not list((told.model / mine.place).glob("*.safetensors"))
        assert not (told.model / mine.place / WORK).exists()
    assert not list((tmp_path / "temporary").iterdir())
    # It serves anew before what was said is forgotten, never the other way round, and each of them at one moment.
    assert [outcome for outcome, _ in groupby(outcomes)] == [(3, True), (4, True), (4, False)]


def test_bad_requests_are_named(told: UpdateSettings) -> None:
    with pytest.raises(VersionError, match="domain/code: it serves as it was saved: no update taught it"):
        forget(replace(told, name="code"), SECRET)
    with pytest.raises(ConfigError, match="a word or more"):
        forget(told, " ")
    mine = Versions(told.model, "domain", "math")
    lock = FileLock(told.model / mine.place / ".update.lock")
    with lock, pytest.raises(VersionError, match="An update of domain/math is running"):
        forget(told, SECRET)
    assert mine.current == 3
    shutil.rmtree(mine.path(1))  # by another hand: what is left has seen it all
    with pytest.raises(VersionError, match="its first version is gone, so it cannot be made anew"):
        forget(told, SECRET)


@pytest.mark.parametrize("topic", ["knee", "KNEE", "my  knee", "c++"])
@pytest.mark.parametrize("other", ["kne", "nee", "knee my"])
def test_a_topic_is_whole_words(topic: str, other: str) -> None:
    said = {"messages": [{"role": "user", "content": "I hurt my\nKnee."}, {"role": "assistant", "content": "C++?"}]}
    assert speaks_of(said, topic) and not speaks_of(said, other)


def test_the_command_shows_it(told: UpdateSettings) -> None:
    line = ["forget", "domain", "math", "--model", str(told.model)]
    found = CliRunner().invoke(app, [*line, "--topic", SECRET, "--learning-rate", "0.03"])
    assert found.exit_code == 0, found.output
    assert "a version that never saw them" in found.output and "Version 4 serves" in found.output
    assert "40 conversations are still remembered. Deleted versions: 2, 3." in found.output
    for wrong in ([], ["--all", "--topic", SECRET]):
        found = CliRunner().invoke(app, [*line, *wrong])
        assert found.exit_code != 0 and "one of them" in str(found.exception)
    found = CliRunner().invoke(app, [*line, "--all"])
    assert found.exit_code == 0 and "domain/math is gone" in found.output
    assert "domain/math" not in MoLoRAModel.from_pretrained(told.model).stack.names
    assert not (told.model / Versions(told.model, "domain", "math").place).exists()
