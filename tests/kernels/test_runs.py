"""Free pages are found as by looking at all of them."""

import random

import pytest

from molora_kernels.runs import Runs


def first_fit(pages: int, of: dict[int, tuple[int, int]], need: int, slot: int) -> int | None:
    taken = {page for other, (first, count) in of.items() if other != slot for page in range(first, first + count)}
    for first in range(pages - need + 1):
        if not taken.intersection(range(first, first + need)):
            return first
    return None


@pytest.mark.parametrize("seed", range(8))
def test_the_first_run_that_is_long_enough(seed: int) -> None:
    chance, runs, of = random.Random(seed), Runs(0, 40), dict[int, tuple[int, int]]()
    refused = 0
    for _ in range(400):
        slot, need = chance.randrange(12), chance.choice((1, 1, 1, 2, 4, 7))
        if chance.random() < 0.3:
            assert runs.give(slot) == of.pop(slot, None)
            continue
        first = runs.fit(need, slot)
        assert first == first_fit(40, of, need, slot)
        if first is None:
            refused += 1
            continue
        runs.give(slot)
        runs.take(slot, (first, need))
        of[slot] = (first, need)
        assert runs.of == of
    assert refused


@pytest.mark.parametrize("seed", range(4))
def test_a_run_under_a_name_is_free_when_its_last_slot_gives_it(seed: int) -> None:
    chance, runs, of = random.Random(seed), Runs(0, 30), dict[int, tuple[int, int]]()
    names, needs = dict[int, str](), {"a": 2, "b": 3, "c": 1}
    joined = 0
    for _ in range(400):
        slot, name = chance.randrange(12), chance.choice((None, *needs))
        if chance.random() < 0.4:
            assert runs.give(slot) == of.pop(slot, None)
            names.pop(slot, None)
            continue
        held = next((of[other] for other, its in names.items() if its == name is not None), None)
        assert runs.shared(name) == held
        need = needs[name] if name else chance.choice((1, 4))
        others = {other: run for other, run in of.items() if other != slot}
        first = runs.fit(need, slot)
        assert first == first_fit(30, others, need, -1)
        run = held or ((first, need) if first is not None else None)
        if run is None:
            continue
        joined += held is not None
        runs.give(slot)
        names.pop(slot, None)
        runs.take(slot, run, name)
        of[slot] = run
        if name:
            names[slot] = name
        assert runs.of == of and runs.names == names
    assert joined > 20


def test_the_digest_is_of_what_is_held_and_not_of_how_it_came() -> None:
    one, other, apart = Runs(1, 8), Runs(1, 8), Runs(2, 8)
    one.take(0, (0, 2)), one.take(3, (2, 1))
    for runs in (other, apart):
        runs.take(5, (0, 1)), runs.take(3, (2, 1)), runs.give(5), runs.take(0, (0, 2))
    assert one.digest == other.digest != apart.digest
    other.give(3)
    assert one.digest != other.digest
    other.take(3, (3, 1))
    assert one.digest != other.digest
    for slot in (0, 3):
        one.give(slot)
    assert one.digest == Runs(1, 8).digest
