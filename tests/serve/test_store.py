"""The adapter store: what it keeps, what it refuses, and what several processes, machines and damages do to it."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save_file

from molora import Adapter, Router, VocabularyRouter
from molora.adapter import CONFIG_FILE, WEIGHTS_FILE
from molora.atomic import PARTIAL, write_text
from molora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    NonFiniteError,
    RouterError,
    StackError,
    StoreError,
    VersionError,
)
from molora.serve import store as store_module
from molora.serve.store import ROUTERS, AdapterStore
from molora.serve.store_index import Index
from molora.serve.store_places import ABOUT
from molora.serve.store_record import FileMark, StoredVersion, content_version
from tests.parity.test_equalities import make_routed
from tests.serve.putting import EACH, assert_same, work

Make = Callable[..., AdapterStore]
BUCKET = "adapters"


def make_folder(folder: Path, seed: int, value: float | None = None) -> Path:
    """The smallest PEFT folder: one module of rank 2."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 8), key.format("B"): torch.randn(8, 2)}
    if value is not None:
        tensors[key.format("A")][0, 0] = value
    save_file(tensors, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "tiny/base"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Four adapters of different content."""
    return [make_folder(tmp_path / "made" / str(seed), seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A local server that speaks S3."""
    running = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which would speak to the one before, if there was one
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL in a bucket of it."""
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": server}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid4().hex}"


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Iterator[Make]:
    """Opens the store as on a machine of the given name: each has a cache of its own."""
    opened = []

    def make(name: str = "one", **settings: Any) -> AdapterStore:
        opened.append(AdapterStore(url, cache=tmp_path / "caches" / name, **settings))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def content(store: AdapterStore, name: str, version: str, file: str) -> str:
    """A file of an adapter in the store itself, not in a cache."""
    prefix = store.url if "://" in store.url else f"file://{store.url}"
    return f"{prefix}/user/{name}/{version}/{file}"


def client_of(url: str) -> Any:
    """The one that the store uses: fsspec gives the same for the same settings."""
    return fsspec.url_to_fs(url, use_listings_cache=False)[0]


def spoil(url: str) -> None:
    """Changes one byte; the size stays."""
    files, path = fsspec.url_to_fs(url)
    found = files.cat_file(path)
    files.pipe_file(path, found[:-1] + bytes([found[-1] ^ 1]))


def test_what_was_put_comes_back_on_every_machine(machine: Make, folders: list[Path]) -> None:
    here, there = machine("one"), machine("two")
    put = here.put("user", "ann", folders[0])
    here.put("user", "anna", folders[1])
    assert (put.ranks, put.base, put.kind) == ((2,), "tiny/base", "adapter")
    assert put.size_bytes == sum((folders[0] / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE))
    for store in (here, there):
        assert_same(store.get("user", "ann"), folders[0])
        assert_same(store.get("user", "ann", put.version), folders[0])
        assert_same(store.get("user", "anna"), folders[1])
        assert store.versions("user", "ann") == [put] and store.names("user") == ["ann", "anna"]


def test_the_same_content_is_one_version(machine: Make, folders: list[Path], tmp_path: Path) -> None:
    store = machine()
    first = store.put("user", "ann", folders[0])
    store.put("user", "ann", folders[1])
    again = store.put("user", "ann", shutil.copytree(folders[0], tmp_path / "copy"))
    assert again == first and store.current("user", "ann") == first.version
    assert len(store.versions("user", "ann")) == 2
    assert store.put("user", "ben", folders[0]).version == first.version


def test_a_new_version_and_the_way_back_are_seen_elsewhere(machine: Make, folders: list[Path]) -> None:
    here, there = machine("one"), machine("two")
    made = [here.put("user", "ann", folder).version for folder in folders[:2]]
    assert_same(there.get("user", "ann"), folders[1])
    made.append(here.put("user", "ann", folders[2]).version)
    assert_same(there.get("user", "ann"), folders[2])
    assert [one.version for one in there.versions("user", "ann")] == made
    assert here.roll_back("user", "ann") == made[1]
    assert_same(there.get("user", "ann"), folders[1])
    there.set_current("user", "ann", made[0])
    assert_same(here.get("user", "ann"), folders[0])
    with pytest.raises(VersionError, match="nothing to go back to"):
        here.roll_back("user", "ann")
    with pytest.raises(VersionError, match=made[2]):
        here.set_current("user", "ann", "0" * 16)
    assert here.current("user", "ann") == made[0]


def test_pruning_leaves_the_newest_and_what_serves(machine: Make, folders: list[Path]) -> None:
    store = machine()
    made = [store.put("user", "ann", folder).version for folder in folders]
    store.set_current("user", "ann", made[0])
    assert store.prune("user", "ann", keep=1) == made[1:3]
    assert [one.version for one in store.versions("user", "ann")] == [made[0], made[3]]
    assert_same(store.get("user", "ann"), folders[0])
    with pytest.raises(VersionError, match="no version"):
        store.get("user", "ann", made[1])


def test_what_is_removed_is_gone_everywhere(machine: Make, folders: list[Path]) -> None:
    here, there = machine("one"), machine("two")
    version = here.put("user", "ann", folders[0]).version
    here.put("user", "anna", folders[1])
    there.get("user", "ann")
    here.remove("user", "ann")
    for store in (here, there):
        for asked in (None, version):
            with pytest.raises((AdapterNotFoundError, VersionError)):
                store.get("user", "ann", asked)
        assert "ann" not in store.names("user") and store.versions("user", "ann") == []
        assert_same(store.get("user", "anna"), folders[1])
    with pytest.raises(AdapterNotFoundError, match="no adapter user/ann"):
        here.remove("user", "ann")
    here.put("user", "ann", folders[0])
    assert_same(there.get("user", "ann"), folders[0])


def test_what_is_half_removed_is_not_there(machine: Make, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = machine("one")
    version = store.put("user", "ann", folders[0]).version
    delete = store._place.delete

    def break_off(path: str) -> None:
        if path.endswith(version):
            raise StoreError("the line is cut")
        delete(path)

    monkeypatch.setattr(store._place, "delete", break_off)
    with pytest.raises(StoreError, match="cut"):
        store.remove("user", "ann")
    for one in (store, machine("two")):
        assert one.versions("user", "ann") == []
        with pytest.raises(VersionError):
            one.get("user", "ann", version)


def test_a_damaged_file_is_set_aside_and_can_be_put_again(machine: Make, folders: list[Path]) -> None:
    made = [machine("one").put("user", "ann", folder).version for folder in folders[:2]]
    store = machine("two")
    spoil(content(store, "ann", made[1], WEIGHTS_FILE))
    with pytest.raises(StoreError, match="another checksum.*set aside.*put it again"):
        store.get("user", "ann")
    for again in (store, machine("three")):
        for asked in (None, made[1]):
            with pytest.raises(VersionError, match=f"set aside.*{made[0]}"):
                again.get("user", "ann", asked)
    assert [one.version for one in store.versions("user", "ann")] == made[:1]
    assert_same(store.get("user", "ann", made[0]), folders[0])
    assert store.put("user", "ann", folders[1]).version == made[1]
    assert_same(machine("four").get("user", "ann"), folders[1])


@pytest.mark.parametrize("file", [WEIGHTS_FILE, ABOUT])
def test_a_missing_or_short_file_is_an_error_of_the_store(machine: Make, folders: list[Path], file: str) -> None:
    version = machine("one").put("user", "ann", folders[0]).version
    store = machine("two")
    files, path = fsspec.url_to_fs(content(store, "ann", version, file))
    files.pipe_file(path, files.cat_file(path)[:40])
    with pytest.raises((StoreError, VersionError), match="set aside"):
        store.get("user", "ann")
    assert store.versions("user", "ann") == []


def test_a_record_that_points_elsewhere_or_is_newer_is_not_followed(machine: Make, folders: list[Path]) -> None:
    store = machine()
    version = store.put("user", "ann", folders[0]).version
    files, path = fsspec.url_to_fs(content(store, "ann", version, ABOUT))
    about = json.loads(files.cat_file(path))
    files.pipe_file(path, json.dumps({**about, "format": 2}).encode())
    with pytest.raises(VersionError, match="update it"):
        machine("two").get("user", "ann")
    other = {**about["files"], CONFIG_FILE: {**about["files"][CONFIG_FILE], "sha256": "0" * 64}}  # of another version
    files.pipe_file(path, json.dumps({**about, "files": other}).encode())
    with pytest.raises(VersionError, match="set aside"):
        machine("four").get("user", "ann")
    strange = {"../../../evil": FileMark(1, "0" * 64)}
    made = StoredVersion("adapter", "user", "ann", content_version(strange), about["created"], strange)
    files.makedirs(fsspec.url_to_fs(content(store, "ann", made.version, ""))[1], exist_ok=True)
    files.pipe_file(fsspec.url_to_fs(content(store, "ann", made.version, ABOUT))[1], made.to_json().encode())
    with pytest.raises(VersionError, match="set aside"):
        machine("five").get("user", "ann", made.version)
    evil = {**about, "files": {**about["files"], "../../../evil": about["files"][CONFIG_FILE]}}
    files.pipe_file(path, json.dumps(evil).encode())
    with pytest.raises(VersionError, match="set aside"):
        machine("three").get("user", "ann")


def test_listing_goes_in_pages_and_reindexing_finds_all(tmp_path: Path, folders: list[Path]) -> None:
    store = AdapterStore(tmp_path / "store")
    first = store.put("user", "u0000", folders[0])
    template = tmp_path / "store" / "user" / "u0000"
    expected = [f"u{number:04}" for number in range(2000)]
    for name in expected[1:]:
        place = shutil.copytree(template, template.with_name(name)) / first.version / ABOUT
        place.write_text(place.read_text().replace("u0000", name))
    store.put("domain", "law", folders[1])
    (tmp_path / "store" / "user" / "u0001" / "current.json").unlink()
    store.close()
    for file in (tmp_path / "store").glob(".index.sqlite*"):
        file.unlink()
    store = AdapterStore(tmp_path / "store")
    assert store.names("user") == []
    assert store.reindex() == (2001, 2001)
    pages = []
    while page := store.names("user", limit=300, after=pages[-1] if pages else ""):
        assert len(page) <= 300
        pages += page
    assert pages == expected and store.names("domain") == ["law"]
    assert store.names("user", "u19", limit=5000) == expected[1900:]
    assert_same(store.get("user", "u1234"), folders[0])
    assert_same(store.get("user", "u0001"), folders[0])
    shutil.rmtree(template)
    assert store.reindex() == (2000, 2000) and "u0000" not in store.names("user", limit=9000)


def test_reindexing_takes_away_what_killed_processes_left(machine: Make, folders: list[Path]) -> None:
    store = machine()
    store.put("user", "ann", folders[0])
    home = store._place.home
    left = [home, home / "user", home / "user" / "ann", home / "_pins" / "user"]
    for folder in left:
        for age, name in ((2 * 24 * 3600, "old"), (3600, "new")):
            made = [folder / f"{PARTIAL}{name}", folder / f"{PARTIAL}{name}-file"]
            made[0].mkdir(parents=True)
            (made[0] / ABOUT).write_text("{}")
            made[1].write_text("half")
            for one in made:
                os.utime(one, (time.time() - age,) * 2)
    assert store.reindex() == (1, 1)
    there = sorted(path.name for path in home.rglob(f"{PARTIAL}*"))
    assert there == [f"{PARTIAL}new"] * len(left) + [f"{PARTIAL}new-file"] * len(left)
    assert_same(store.get("user", "ann"), folders[0])


def test_another_machines_names_come_with_reindexing(machine: Make, folders: list[Path]) -> None:
    here, there = machine("one"), machine("two", index=None)
    for number, folder in enumerate(folders):
        here.put("user", f"u{number}", folder)
    here.put("user", "u0", folders[1])
    assert there.reindex() == (4, 5)
    assert there.names("user", limit=3) == ["u0", "u1", "u2"] and there.names("user", after="u2") == ["u3"]


@pytest.mark.parametrize("name", ["../evil", "a/b", "/etc", "", ".hidden", "a\\b", "..", "x" * 65, "none", "ann\n"])
def test_names_are_never_paths(tmp_path: Path, folders: list[Path], name: str) -> None:
    store = AdapterStore(tmp_path / "store")
    before = sorted(tmp_path.rglob("[!.]*"))
    for layer, adapter in ((name, "ann"), ("user", name)):
        for attempt in (store.get, store.versions, store.current, store.roll_back, store.remove, store.prune):
            with pytest.raises(StackError, match="cannot name"):
                attempt(layer, adapter)
        with pytest.raises(StackError, match="cannot name"):
            store.put(layer, adapter, folders[0])
    with pytest.raises(StackError):
        store.put(ROUTERS, "ann", folders[0])  # adapters do not go where routers are
    with pytest.raises(VersionError, match="no version"):
        store.get("user", "ann", name)
    assert sorted(tmp_path.rglob("[!.]*")) == before


def test_what_is_too_large_is_not_even_read(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "store", most_bytes=400)
    monkeypatch.setattr(Adapter, "load", lambda path: pytest.fail("it was read"))
    with pytest.raises(AdapterFormatError, match="this store takes 400"):
        store.put("user", "ann", folders[0])
    assert store.names("user") == [] and not (tmp_path / "store" / "user").exists()


def test_what_others_put_is_not_brought_if_too_large(s3: str, tmp_path: Path, folders: list[Path]) -> None:
    AdapterStore(s3, cache=tmp_path / "one").put("user", "ann", folders[0])
    small = AdapterStore(s3, cache=tmp_path / "two", most_bytes=400)
    with pytest.raises(AdapterFormatError, match="user/ann/.*this store takes 400"):
        small.get("user", "ann")
    assert not list((tmp_path / "two").rglob("*.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    store, folder = AdapterStore(tmp_path / "store"), make_folder(tmp_path / "bad", 1, value)
    with pytest.raises(NonFiniteError, match=str(folder)):
        store.put("user", "ann", folder)
    assert store.names("user") == [] and not (tmp_path / "store" / "user").exists()
    assert list((tmp_path / "store").glob(".partial-*")) == []


@contextmanager
def full_disk(room_bytes: int = 200) -> Iterator[None]:
    """No file can be longer within."""
    before, signals = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signals)


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "one.txt", "before")
    with pytest.raises(OSError), full_disk():
        write_text(tmp_path / "one.txt", "x" * 1000)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("one.txt", "before")]


def test_a_full_disk_is_an_error_of_the_store(machine: Make, folders: list[Path]) -> None:
    store = machine()
    before = store.put("user", "ann", folders[0])
    with pytest.raises(StoreError, match="cannot be written to.*Make room"), full_disk():
        store.put("user", "ann", folders[1])
    assert store.versions("user", "ann") == [before]
    assert_same(store.get("user", "ann"), folders[0])
    assert not list(store._place.home.rglob(f"{PARTIAL}*"))
    store.put("user", "ann", folders[1])
    assert_same(store.get("user", "ann"), folders[1])


def test_what_is_stored_is_what_was_checked(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = make_folder(tmp_path / "bad", 1, float("nan"))

    def change(source: Path, target: Path) -> None:  # somebody writes to the folder meanwhile
        target.write_bytes((bad / Path(source).name).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", change)
    with pytest.raises(NonFiniteError):
        AdapterStore(tmp_path / "store").put("user", "ann", folders[0])


def test_a_pickle_or_no_folder_is_refused(tmp_path: Path, folders: list[Path]) -> None:
    store = AdapterStore(tmp_path / "store")
    (folders[0] / WEIGHTS_FILE).rename(folders[0] / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="a pickle, which is never read"):
        store.put("user", "ann", folders[0])
    for nothing in (tmp_path / "nothing", "some/hub-id"):
        with pytest.raises(AdapterNotFoundError, match="no adapter folder"):
            store.put("user", "ann", nothing)


def test_a_full_store_refuses_new_names_only(tmp_path: Path, folders: list[Path]) -> None:
    store = AdapterStore(tmp_path / "store", most_adapters=1)
    store.put("user", "ann", folders[0])
    with pytest.raises(StoreError, match="larger most_adapters"):
        store.put("user", "ben", folders[0])
    store.put("user", "ann", folders[1])
    store.remove("user", "ann")
    store.put("user", "ben", folders[0])


def test_an_upload_that_breaks_off_is_not_there(
    s3: str, tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = AdapterStore(s3, cache=tmp_path / "one"), AdapterStore(s3, cache=tmp_path / "two")
    before = store.put("user", "ann", folders[0])
    files = client_of(s3)
    send = files.put_file

    def break_off(local: str, remote: str) -> None:
        if remote.endswith(ABOUT):
            raise ConnectionResetError("the line is cut")
        send(local, remote)

    with monkeypatch.context() as cut:
        cut.setattr(files, "put_file", break_off)
        for name in ("ann", "ben"):
            with pytest.raises(StoreError, match="does not answer.*cut"):
                store.put("user", name, folders[1])
    for one in (store, other):
        assert one.versions("user", "ann") == [before] and one.versions("user", "ben") == []
        assert_same(one.get("user", "ann"), folders[0])
        with pytest.raises(AdapterNotFoundError):
            one.get("user", "ben")
        assert one.reindex() == (1, 1) and one.names("user") == ["ann"]
    assert len(files.ls(f"{s3}/user/ben", detail=True)) == 1  # the files without a record
    store.put("user", "ben", folders[1])
    assert_same(other.get("user", "ben"), folders[1])


def test_a_copy_is_brought_once_and_a_damaged_copy_again(
    s3: str, tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    AdapterStore(s3, cache=tmp_path / "one").put("user", "ann", folders[0])
    brought: list[str] = []
    bring = client_of(s3).get_file

    def count(remote: str, local: str) -> None:
        brought.append(remote)
        bring(remote, local)

    monkeypatch.setattr(client_of(s3), "get_file", count)
    for _ in range(3):
        store = AdapterStore(s3, cache=tmp_path / "two")
        copy = store.get("user", "ann")
        assert store.get("user", "ann") == copy
        assert len(brought) == 3  # two files and the record, in all
    spoil(f"file://{copy / WEIGHTS_FILE}")
    assert_same(AdapterStore(s3, cache=tmp_path / "two").get("user", "ann"), folders[0])
    assert len(brought) == 6


def test_the_cache_drops_what_was_not_used_for_longest(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}"
    far = AdapterStore(url, cache=tmp_path / "one")
    sizes = [far.put("user", f"u{number}", folder).size_bytes for number, folder in enumerate(folders)]
    assert len(set(sizes)) == 1
    near = AdapterStore(url, cache=tmp_path / "two", cache_bytes=2 * sizes[0])
    handed_out = [near.get("user", f"u{number}") for number in range(3)]
    assert all(copy.is_dir() for copy in handed_out)  # in use: more than the limit, for ten minutes
    monkeypatch.setattr(store_module, "IDLE_S", -1)
    near.get("user", "u0")
    newest = near.get("user", "u3")
    assert [copy.is_dir() for copy in handed_out] == [True, False, False] and newest.is_dir()
    assert_same(near.get("user", "u1"), folders[1])
    assert not newest.is_dir() or not handed_out[0].is_dir()
    assert (far.evictions, near.evictions) == (0, 3)


def test_pins_are_seen_by_every_machine(machine: Make, folders: list[Path]) -> None:
    here, there = machine("one"), machine("two")
    for name in ("ann", "ben", "eve"):
        here.put("user", name, folders[0])
    assert here.pinned("user") == [] and not here.unpin("user", "ann")
    assert here.pin("user", "eve") and there.pin("user", "ann") and not here.pin("user", "ann")
    assert here.pinned("user") == there.pinned("user") == ["ann", "eve"] and here.pinned("team") == []
    with pytest.raises(AdapterNotFoundError):
        here.pin("user", "nobody")
    there.remove("user", "eve")
    assert here.pinned("user") == ["ann"] and here.reindex() == (2, 2)
    assert here.unpin("user", "ann") and there.pinned("user") == []


def test_a_store_that_does_not_answer_or_is_unknown(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="fsspec"):
        AdapterStore("nowhere://bucket", cache=tmp_path)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    monkeypatch.setattr(type(fsspec.filesystem("s3")), "retries", 1)
    store = AdapterStore("s3://nowhere/prefix", cache=tmp_path)
    for attempt in (lambda: store.get("user", "ann"), lambda: store.put("user", "ann", folders[0])):
        with pytest.raises(StoreError, match="does not answer.*Check the network"):
            attempt()
    assert store.names("user") == []
    fsspec.filesystem("s3").clear_instance_cache()


def test_routers_have_versions_too(machine: Make, base: Any, adapters: dict[str, Path], tmp_path: Path) -> None:
    here, there = machine("one"), machine("two")
    model = make_routed(base, adapters)
    router = model.router
    assert isinstance(router, Router)
    model.save_pretrained(tmp_path / "model")
    first = here.put_router("main", router)
    assert here.put_router("main", tmp_path / "model") == first and first.kind == "router"
    found = there.get_router("main")
    assert isinstance(found, Router) and found.config == router.config and found.rows == router.rows
    assert all(torch.equal(value, router.state_dict()[key]) for key, value in found.state_dict().items())
    rules = VocabularyRouter({"domain/math": [1, [3, 5]]}, ["domain/none", "domain/math"], 97)
    second = here.put_router("main", rules)
    ruled = there.get_router("main")
    assert isinstance(ruled, VocabularyRouter) and ruled.rules == rules.rules and ruled.rows == rules.rows
    assert [one.version for one in there.versions(ROUTERS, "main")] == [first.version, second.version]
    assert there.roll_back(ROUTERS, "main") == first.version and isinstance(here.get_router("main"), Router)
    with pytest.raises(RouterError, match="no router 'other'"):
        here.get_router("other")
    here.remove(ROUTERS, "main")
    with pytest.raises(RouterError, match="no router 'main'"):
        there.get_router("main")


def test_a_router_with_nan_is_refused(tmp_path: Path, base: Any, adapters: dict[str, Path]) -> None:
    router = make_routed(base, adapters).router
    assert isinstance(router, Router)
    torch.nn.init.constant_(router.parts[0].output.weight, float("nan"))
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(RouterError, match="NaN"):
        store.put_router("main", router)
    assert store.names(ROUTERS) == []


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_processes_at_once_lose_nothing(
    kind: str, tmp_path: Path, folders: list[Path], request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("s3")
    spawn = multiprocessing.get_context("spawn")
    start, failures = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=work, args=(url, tmp_path / "cache", folders, mine, start, failures)) for mine in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0], failures.get(timeout=5)
    store = AdapterStore(url, cache=tmp_path / "cache")
    expected = sorted(["all", *(f"{mine}{number}" for mine in "ab" for number in range(EACH))])
    assert store.names("user") == expected
    for mine in "ab":
        for number in range(EACH):
            assert_same(store.get("user", f"{mine}{number}"), folders[number % len(folders)])
    assert len(store.versions("user", "all")) == len(folders)
    assert store.reindex() == (2 * EACH + 1, 2 * EACH + len(folders))
    with pytest.raises(AdapterError):
        store.get("user", "c0")


def test_many_open_a_new_index_at_once(tmp_path: Path) -> None:
    for number in range(40):
        go, failed = threading.Barrier(8), list[Exception]()

        def run(file: Path = tmp_path / f"{number}.sqlite", go: threading.Barrier = go) -> None:
            go.wait(30)
            try:
                Index(file)
            except StoreError as error:
                failed.append(error)  # noqa: B023

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_a_broken_index_keeps_no_adapter_from_being_served(
    machine: Make, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    machine("one").put("user", "ann", folders[0])
    store = machine("two")
    store._index._base.execute("DROP TABLE names")
    store._index._base.execute("DROP TABLE cached")
    assert_same(store.get("user", "ann"), folders[0])
    assert_same(store.get("user", "ann"), folders[0])
    with pytest.raises(AdapterNotFoundError):
        store.get("user", "ben")
    assert "no such table" in caplog.text and "call reindex" in caplog.text
    for ask in (lambda: store.names("user"), store.reindex, lambda: store.put("user", "ben", folders[1])):
        with pytest.raises(StoreError, match="no such table.*delete it"):
            ask()


def test_an_index_goes_on_after_its_disk_was_full(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.add("user", "ann")
    with full_disk((tmp_path / "index.sqlite-wal").stat().st_size):
        for _ in range(2):
            with pytest.raises(StoreError, match="Make room"):
                index.add("user", "ben")
        assert index.names("user", "", "", 9) == ["ann"]
    index.add("user", "eve")
    assert index.names("user", "", "", 9) == ["ann", "eve"]
    index.close()
