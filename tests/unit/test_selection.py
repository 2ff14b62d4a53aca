"""Selections against a stack: what they resolve to, and every sentence that refuses one."""

from typing import Any

import pytest
import torch

from molora import Stack, StackLayer
from molora.errors import SelectionError
from molora.selection import ResolvedSelection, candidates, column_layers, resolve, router_rows
from molora.stack import SlotTable


def make_stack(**domain: Any) -> Stack:
    return Stack(
        [
            StackLayer("personality", {"sage": "s"}, default="sage"),
            StackLayer("domain", {"math": "m", "code": "c"}, **domain),
            StackLayer("user", {"ada": "a", "bob": "b"}, shared=True),
            StackLayer("empty", {}),
        ]
    )


def slots_of(stack: Stack) -> SlotTable:
    slots = SlotTable()
    for name in stack.names:
        slots.take(name)
    return slots


def run(selection: Any, has_router: bool = True, **domain: Any) -> ResolvedSelection:
    stack = make_stack(**domain)
    return resolve(selection, stack, candidates(stack, slots_of(stack)), has_router)


def forced(resolved: ResolvedSelection) -> list[list[int]]:
    return resolved.forced.tolist()


def test_candidates_and_rows() -> None:
    stack = make_stack(top_k=2)
    personality, domain, user, empty = candidates(stack, slots_of(stack))
    assert personality.slots == [0, -1] and personality.all == slice(0, 2) and personality.columns == slice(0, 1)
    assert domain.slots == [1, 2, -1] and domain.all == slice(2, 5) and domain.columns == slice(1, 3)
    assert user.slots == [3, 4, -1] and user.rows == ["user/*", "user/*", "user/none"]
    assert empty.slots == [-1] and empty.columns == slice(4, 5)
    assert router_rows(stack) == [
        "personality/sage",
        "personality/none",
        "domain/math",
        "domain/code",
        "domain/none",
        "user/*",
        "user/none",
        "empty/none",
    ]


@pytest.mark.parametrize("nothing", [None, {}, [{}]], ids=str)
def test_defaults(nothing: Any) -> None:
    resolved = run(nothing)
    assert forced(resolved) == [[0, -1, -1, -1]]
    assert resolved.routed.tolist() == [[False, True, False, False]]
    assert resolved.allowed.tolist() == [[False, False, True, True, True, False, False, False, False]]
    assert resolved.any_routed and resolved.uniform


def test_without_a_router_the_default_auto_is_off() -> None:
    resolved = run(None, has_router=False)
    assert forced(resolved) == [[0, -1, -1, -1]] and not resolved.any_routed and not resolved.allowed.any()


def test_a_default_name() -> None:
    assert forced(run(None, default="code")) == [[0, 2, -1, -1]]
    assert forced(run({"domain": None}, default="code")) == [[0, -1, -1, -1]]


def test_one_name_is_forced_into_the_first_column() -> None:
    resolved = run({"domain": "code", "user": "bob"}, top_k=2)
    assert forced(resolved) == [[0, 2, -1, 4, -1]] and not resolved.any_routed


def test_a_list_leaves_these_and_none() -> None:
    resolved = run({"domain": ["code", "code"]})
    assert resolved.allowed[0, 2:5].tolist() == [False, True, True]
    assert resolved.routed.tolist() == [[False, True, False, False]]
    assert run({"domain": ("math", "code")}).allowed[0, 2:5].all()
    assert not run({"domain": []}).any_routed


def test_weights_force_several_adapters() -> None:
    """What a layer has no column for stands in columns after all layers'."""
    resolved = run({"domain": {"math": 0.5, "code": -2}, "user": {"bob": 1.0, "ada": 0.25}})
    assert forced(resolved) == [[0, 1, 4, -1, 2, 3]]
    assert resolved.shares.tolist() == [[1.0, 0.5, 1.0, 1.0, -2.0, 0.25]]
    assert resolved.routed.shape == (1, 5) and not resolved.any_routed and resolved.uniform and not resolved.unit
    assert column_layers(candidates(make_stack(), slots_of(make_stack())), 6) == [
        "personality", "domain", "user", "empty", None, None
    ]  # fmt: skip
    wide = run({"domain": {"math": 1.0, "code": 1.0}}, top_k=2)
    assert forced(wide) == [[0, 1, 2, -1, -1]] and wide.routed.shape == (1, 4) and wide.unit
    assert forced(run({"domain": {}})) == [[0, -1, -1, -1]] and run({"domain": {}}).unit


def test_sequences_with_other_weights() -> None:
    resolved = run([{"domain": {"math": 0.5, "code": 1.0}}, {"domain": "auto"}, {"domain": {"math": 0.5}}])
    assert forced(resolved) == [[0, 1, -1, -1, 2], [0, -1, -1, -1, -1], [0, 1, -1, -1, -1]]
    assert resolved.routed.tolist() == [[False] * 5, [False, True, False, False, False], [False] * 5]
    assert not resolved.uniform and resolved.routed_layers == (1,)
    assert not run([{"domain": {"math": 0.5}}, {"domain": {"math": 0.6}}]).uniform
    assert run([{"domain": {"math": 0.5}}] * 2).expand(4).shares.tolist() == [[1.0, 0.5, 1.0, 1.0]] * 4


def test_one_shared_adapter_may_be_routed() -> None:
    resolved = run({"user": ["bob"]})
    assert resolved.routed[0, 2] and resolved.allowed[0, 5:8].tolist() == [False, True, True]


def test_auto_on_an_empty_layer_is_off() -> None:
    assert not run({"empty": "auto", "domain": None}).any_routed


def test_one_selection_a_sequence() -> None:
    resolved = run([{"domain": "math"}, {"domain": "auto"}, {"domain": None, "personality": None}])
    assert forced(resolved) == [[0, 1, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]
    assert resolved.routed[:, 1].tolist() == [False, True, False]
    assert resolved.any_routed and not resolved.uniform
    assert run([{"domain": "math"}] * 3).uniform


@pytest.mark.parametrize("batch", [1, 6])
def test_one_selection_serves_a_batch(batch: int) -> None:
    expanded = run({"domain": "math"}).expand(batch)
    assert forced(expanded) == [[0, 1, -1, -1]] * batch and expanded.uniform


def test_beams_and_returned_sequences_repeat_in_place() -> None:
    resolved = run([{"domain": "math"}, {"domain": "auto"}])
    expanded = resolved.expand(6)
    assert expanded.forced[:, 1].tolist() == [1, 1, 1, -1, -1, -1]
    assert expanded.routed[:, 1].tolist() == [False, False, False, True, True, True]
    assert torch.equal(expanded.allowed, resolved.allowed[[0, 0, 0, 1, 1, 1]])
    assert resolved.expand(2) is resolved


@pytest.mark.parametrize(("count", "batch"), [(3, 2), (2, 3), (4, 6), (2, 1)])
def test_more_selections_than_sequences(count: int, batch: int) -> None:
    with pytest.raises(SelectionError, match=f"{count} selections were given for a batch of {batch}"):
        run([{}] * count).expand(batch)


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        ({"tone": "sage"}, "no layer 'tone' in this stack; it has personality, domain, user, empty"),
        ({"domain": "law"}, "Layer 'domain' has no adapter 'law'; it has math, code"),
        ({"domain": ["math", "law"]}, "Layer 'domain' has no adapter 'law'"),
        ({"empty": "law"}, "it has none at all"),
        ({"domain": 3}, "Layer 'domain': 3 is no choice"),
        ({"domain": ["math", 3]}, "is no choice"),
        ({"domain": True}, "is no choice"),
        ({"domain": {"math": "half"}}, "the weight of 'math' must be a number, not 'half'"),
        ({"domain": {"math": True}}, "must be a number"),
        ({"domain": {"math": float("nan")}}, "must be a number"),
        ({"domain": {"math": 0.5, "law": 0.5}}, "Layer 'domain' has no adapter 'law'"),
        ({"domain": {3: 0.5}}, "no adapter 3"),
        ({"domain": {"math"}}, "is no choice"),
        ({"domain": ["auto"]}, "no adapter 'auto'"),
        ({"domain": "none"}, "no adapter 'none'"),
        ({"domain": ""}, "no adapter ''"),
        ({3: "math"}, "no layer 3"),
        ({"user": "auto"}, "cannot tell the adapters of 'user' apart: name one of ada, bob"),
        ({"user": ["ada", "bob"]}, "cannot tell the adapters of 'user' apart"),
        ([], "An empty list of selections"),
        (["auto"], "A selection maps layers to choices; 'auto' does not"),
        ("auto", "A selection maps layers to choices"),
        ([None], "A selection maps layers to choices"),
        (5, "A selection maps layers to choices"),
    ],
    ids=str,
)
def test_refused(selection: Any, sentence: str) -> None:
    with pytest.raises(SelectionError, match=sentence):
        run(selection)


@pytest.mark.parametrize("choice", ["auto", ["math"]], ids=str)
def test_choosing_needs_a_router(choice: Any) -> None:
    with pytest.raises(SelectionError, match="needs a router, and this stack has none"):
        run({"domain": choice}, has_router=False)


def test_slots_stay_while_others_leave() -> None:
    slots = slots_of(make_stack())
    assert slots.free("domain/math") == 1
    assert slots["domain/code"] == 2 and slots.names[1] == ""
    assert slots.take("domain/law") == 1 and slots["domain/law"] == 1 and len(slots) == 5
    assert slots.take("domain/art") == 5
