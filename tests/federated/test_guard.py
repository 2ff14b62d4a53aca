"""Hostile updates: each is refused with its reason, and honest ones beside it are taken."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from molora.errors import UpdateError
from molora_training.federated.guard import Asked, Guard, Update
from molora_training.federated.lora import Lora, distance, factor_distance

ABOUT = {"round": 3, "nonce": "abc", "examples": 8}


def factors(seed: int, rank: int = 2, size: float = 1.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    return Lora(
        {
            name: (torch.randn(rank, 6, generator=generator), size * torch.randn(5, rank, generator=generator))
            for name in ("q", "v")
        },
        2.0,
    )


ASKED = Asked(3, "abc", factors(0))


def guard() -> Guard:
    return Guard(max_examples=10, max_norm=5.0)


def test_an_honest_update_is_taken() -> None:
    found = guard().read(factors(1).to_bytes(ABOUT), ASKED)
    assert found.examples == 8 and found.factors.rank == 2 and found.norm > 0
    assert torch.equal(found.factors.pairs["q"][0], factors(1).pairs["q"][0])


def changed(name: str, tensor: torch.Tensor | None) -> Lora:
    pairs: dict[str, Any] = dict(factors(1).pairs)
    if tensor is None:
        del pairs[name]
    else:
        pairs[name] = (tensor, pairs.get(name, pairs["q"])[1].clone())
    return Lora(pairs, 2.0)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (factors(1, rank=3), r"is \[3, 6\], and \[2, 6\] was sent"),
        (changed("q", torch.ones(2, 7)), r"is \[2, 7\]"),
        (changed("q", torch.ones(2, 6, dtype=torch.float64)), "float64"),
        (changed("q", torch.ones(2, 6, dtype=torch.int32)), "int32"),
        (changed("q", torch.full((2, 6), torch.nan)), "NaN"),
        (changed("q", torch.full((2, 6), -torch.inf)), "infinite"),
        (changed("q", None), r"missing: base_model\.model\.q"),
        (changed("head", torch.ones(2, 6)), r"unknown: base_model\.model\.head"),
        (replace(factors(1), scale=200.0), "scale is 200.0"),
        (replace(factors(1), scale=-2.0), "scale is -2.0"),
    ],
)
def test_a_malformed_update_is_refused(update: Lora, reason: str) -> None:
    with pytest.raises(UpdateError, match=reason):
        guard().read(update.to_bytes(ABOUT), ASKED)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"round": 2}, "replay"),
        ({"nonce": "abd"}, "replay"),
        ({"round": None}, "replay"),
        ({"examples": 11}, "claims 11"),
        ({"examples": 0}, "claims 0"),
        ({"examples": -5}, "claims -5"),
        ({"examples": True}, "claims True"),
        ({"examples": 1e9}, "claims 1000000000.0"),
        ({"examples": "8"}, "claims '8'"),
    ],
)
def test_what_it_says_of_itself_is_checked(about: dict[str, Any], reason: str) -> None:
    with pytest.raises(UpdateError, match=reason):
        guard().read(factors(1).to_bytes(ABOUT | about), ASKED)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x80\x04\x95.",
        b"\xff" * 100,
        save({"q": torch.ones(1)}),
        save({"q": torch.ones(1)}, {"scale": "nan", "about": "{}"}),
        save({"q": torch.ones(1)}, {"scale": "1", "about": "[" * 100_000}),
        save({"q": torch.ones(1)}, {"scale": "1", "about": "7"}),
        factors(1).to_bytes(ABOUT)[:-3],
    ],
)
def test_bytes_that_are_no_update_are_refused(message: bytes) -> None:
    with pytest.raises(UpdateError):
        guard().read(message, ASKED)


def test_the_same_tensors_are_not_taken_twice() -> None:
    own = guard()
    first = own.read(factors(1).to_bytes(ABOUT), ASKED)
    assert own.compare({"ada": first}) == {} == own.compare({"ada": first})  # a round may be tried again
    own.keep([first])
    with pytest.raises(UpdateError, match="came before"):
        own.read(factors(1).to_bytes(ABOUT | {"nonce": "new", "round": 4}), replace(ASKED, nonce="new", round=4))
    again = Guard(10, 5.0, seen=own.seen)  # as after a resumption
    with pytest.raises(UpdateError, match="came before"):
        again.read(factors(1).to_bytes(ABOUT), ASKED)


def test_two_clients_with_one_update_count_once() -> None:
    one = guard().read(factors(1).to_bytes(ABOUT), ASKED)
    other = guard().read(factors(2).to_bytes(ABOUT), ASKED)
    assert list(guard().compare({"ada": one, "copy": one, "bob": other})) == ["copy"]


def test_a_huge_update_is_refused_beside_the_others() -> None:
    own = guard()
    honest = {f"c{seed}": own.read(factors(seed).to_bytes(ABOUT), ASKED) for seed in range(1, 5)}
    huge = own.read(factors(9, size=1e4).to_bytes(ABOUT), ASKED)
    refused = own.compare({**honest, "liar": huge})
    assert list(refused) == ["liar"] and "times the round's median" in refused["liar"]


def test_two_updates_have_no_median() -> None:
    updates = {"ada": Update(factors(1), 1, 1.0, "a"), "bob": Update(factors(2), 1, 1e9, "b")}
    assert guard().compare(updates) == {}


def test_where_nobody_changes_anything_whoever_does_is_refused() -> None:
    updates = {name: Update(factors(1), 1, norm, name) for name, norm in (("a", 0.0), ("b", 0.0), ("c", 1.0))}
    assert list(guard().compare(updates)) == ["c"]


@pytest.mark.parametrize("measure", [distance, factor_distance])
def test_what_overflows_is_refused_even_without_a_median(measure: Any) -> None:
    """Of finite values, and finite in float64: as the adapter's float32 it would be infinite."""
    wild = Lora({n: (a * 1e35, b * 1e35) for n, (a, b) in factors(1).pairs.items()}, 2.0)
    with pytest.raises(UpdateError, match="nothing finite can be made"):
        replace(guard(), measure=measure).read(wild.to_bytes(ABOUT), ASKED)
