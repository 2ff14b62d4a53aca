"""Settings: YAML, overrides, and a sentence for each mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from molora.errors import ConfigError
from molora_training.settings import load_settings, work_folder


@dataclass(frozen=True)
class Inner:
    rank: int = 8
    names: tuple[str, ...] = ("q_proj",)


@dataclass(frozen=True)
class Outer:
    out: Path
    rate: float = 1e-3
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("out: here\nrate: 1e-4\ninner:\n  rank: 4\n")
    settings = load_settings(Outer, file, ["inner.names=[a, b]", "limit=3", "kind=b"])
    assert settings == Outer(Path("here"), 1e-4, 3, "b", Inner(4, ("a", "b")))


def test_a_default_unlike_its_kind_holds_where_only_some_of_it_is_given() -> None:
    @dataclass(frozen=True)
    class Whole:
        inner: Inner = field(default_factory=lambda: Inner(names=("v_proj",)))

    assert load_settings(Whole, None, ["inner.rank=4"]) == Whole(Inner(4, ("v_proj",)))
    assert load_settings(Whole, None, ["inner.names=[o_proj]"]) == Whole(Inner(8, ("o_proj",)))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("speed=3", "Unknown setting speed; there are: out, rate"),
        ("inner.speed=3", "Unknown setting inner.speed; there are: inner.rank, inner.names"),
        ("inner=3", "inner holds settings of its own"),
        ("inner.rank=true", "inner.rank must be int"),
        ("rate=fast", "rate must be float"),
        ("kind=c", "kind must be one of 'a', 'b'"),
        ("limit=x", "limit must be"),
        ("rate", "must look like key=value"),
        ("out.x=1", "holds no settings of its own"),
    ],
)
def test_mistakes_are_named(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_settings(Outer, None, ["out=here", override])


def test_missing_key_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out is missing"):
        load_settings(Outer, None)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Outer, tmp_path / "none.yaml")


def test_results_of_one_name_do_not_share_checkpoints() -> None:
    first, second = (work_folder("adapter", Path(root, "adapters", "math")) for root in ("a", "b"))
    assert first != second and first.name.startswith("math-")
    assert work_folder("adapter", Path("a", "adapters", "math")) == first


def test_a_file_that_extends_another_names_what_is_different(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("out: here\nrate: 1e-4\ninner:\n  rank: 4\n")
    file = tmp_path / "other.yaml"
    file.write_text("extends: whole.yaml\nout: there\n")
    settings = load_settings(Outer, file, ["limit=3"])
    whole = load_settings(Outer, tmp_path / "whole.yaml", ["out=there", "limit=3"])
    assert settings == whole
    for bad in ("other.yaml", "../whole.yaml", "[whole.yaml]"):
        file.write_text(f"extends: {bad}\n")
        with pytest.raises(ConfigError, match=r"extends .*, which is no other file beside it"):
            load_settings(Outer, file)
    file.write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_settings(Outer, file)
