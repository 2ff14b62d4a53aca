"""The stack and its file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from molora import Stack, StackLayer
from molora.errors import StackError

UNSAFE = ["../x", "a/b", "a\\b", "", "auto", "Auto", "none", "a" * 65, ".hidden", "..", "-x", "a b", "x.", "é", "a\n"]


@pytest.mark.parametrize("name", [*UNSAFE, None, 3, True, ("a",)], ids=repr)
def test_unsafe_names(name: Any) -> None:
    with pytest.raises(StackError, match="cannot name a layer"):
        StackLayer(name)
    with pytest.raises(StackError, match="cannot name an adapter"):
        StackLayer("domain", {name: "path"})


@pytest.mark.parametrize("name", ["math", "Math-2", "a", "0", "a.b", "a_b", "a" * 64])
def test_safe_names(name: str) -> None:
    assert StackLayer(name, {name: "path"}).adapters == {name: "path"}


@pytest.mark.parametrize("top_k", [0, -1, 1.0, True, "2", None], ids=repr)
def test_bad_top_k(top_k: Any) -> None:
    with pytest.raises(StackError, match="top_k must be a whole number from 1"):
        StackLayer("domain", {}, top_k=top_k)


@pytest.mark.parametrize("default", ["law", "none", "", 3, ["math"]], ids=repr)
def test_bad_default(default: Any) -> None:
    with pytest.raises(StackError, match="default"):
        StackLayer("domain", {"math": "path"}, default=default)


@pytest.mark.parametrize("shared", ["yes", "false", 2], ids=repr)
def test_bad_shared(shared: Any) -> None:
    with pytest.raises(StackError, match="shared"):
        StackLayer("domain", {}, shared=shared)


def test_adapters_must_be_a_mapping() -> None:
    with pytest.raises(StackError, match="adapters must map names to folders"):
        StackLayer("domain", ["math"])  # type: ignore[arg-type]


def test_a_shared_layer_is_off_by_default() -> None:
    assert StackLayer("user", {"ada": "a"}, shared=True).default is None
    assert StackLayer("user", {"ada": "a"}, shared=True, default="ada").default == "ada"


def test_layers_are_found_by_name() -> None:
    stack = Stack([StackLayer("a", {"x": "1"}), StackLayer("b", {"x": "2", "y": "3"})])
    assert stack["b"] is stack.layers[1] and "a" in stack and "c" not in stack
    assert stack.names == ["a/x", "b/x", "b/y"]
    with pytest.raises(StackError, match="no layer 'c'; the stack has a, b"):
        stack["c"]


def test_layers_need_different_names_and_one_of_them() -> None:
    with pytest.raises(StackError, match="different names"):
        Stack([StackLayer("a"), StackLayer("a")])
    with pytest.raises(StackError, match="at least one layer"):
        Stack([])


def test_yaml_round_trip(tmp_path: Path) -> None:
    stack = Stack(
        [
            StackLayer("domain", {"math": "org/math", "code": str(tmp_path / "code")}, top_k=2, default="math"),
            StackLayer("user", {"ada": "/absolute/ada"}, shared=True),
            StackLayer("empty", {}, default=None),
        ]
    )
    stack.save(tmp_path / "stack.yaml")
    again = Stack.load(tmp_path / "stack.yaml")
    assert again.layers == stack.layers
    assert again.to_dict() == stack.to_dict()


def test_relative_paths_are_taken_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "math").mkdir(parents=True)
    (tmp_path / "stack.yaml").write_text("layers: [{name: d, adapters: {m: adapters/math, h: some/hub-id}}]")
    adapters = Stack.load(tmp_path / "stack.yaml")["d"].adapters
    assert adapters == {"m": str(tmp_path / "adapters" / "math"), "h": "some/hub-id"}


def test_a_folder_stands_for_all_adapters_in_it(tmp_path: Path) -> None:
    for name in ("law", "code", ".half-done", "notes"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        if name != "notes":
            (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "stack.yaml").write_text("layers: [{name: d, adapters: adapters}]")
    found = Stack.load(tmp_path / "stack.yaml")["d"].adapters
    assert found == {name: str(tmp_path / "adapters" / name) for name in ("code", "law")}
    (tmp_path / "stack.yaml").write_text("layers: [{name: d, adapters: nowhere}]")
    with pytest.raises(StackError, match="nowhere holds no adapters"):
        Stack.load(tmp_path / "stack.yaml")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"layers": {}},
        {"layers": [], "extra": 1},
        {"layers": []},
        {"layers": ["domain"]},
        {"layers": [{}]},
        {"layers": [{"name": "a", "topk": 2}]},
        {"layers": [{"name": "a", "adapters": ["x"]}]},
        {"layers": [{"name": "a", "adapters": {"../x": "p"}}]},
        {"layers": [{"name": "a", "adapters": {"x": None}}]},
        {"layers": [{"name": "a", "adapters": {"x": ["p"]}}]},
        {"layers": [{"name": "a", "default": ["x"]}]},
        {"layers": [{"name": "a"}, {"name": "a"}]},
        {"layers": [{"name": ["a"]}]},
    ],
    ids=str,
)
def test_bad_descriptions(data: Any, tmp_path: Path) -> None:
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(StackError):
        Stack.load(tmp_path / "stack.yaml")


@pytest.mark.parametrize(
    "content",
    [b"layers: [", b"a: b: c", b"!!python/object:os.system {}", b"\xff\xfe\x00layers"],
    ids=["open", "colons", "object", "binary"],
)
def test_unreadable_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stack.yaml").write_bytes(content)
    with pytest.raises(StackError):
        Stack.load(tmp_path / "stack.yaml")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="not a readable stack file"):
        Stack.load(tmp_path / "stack.yaml")
