"""The batch plan: nothing lost, nothing too large, the same for the same seed."""

import random

from molora_training.batches import plan_pass, plan_steps, rounded

LENGTHS = [random.Random(1).randint(5, 300) for _ in range(500)]


def test_each_epoch_holds_every_example_within_the_budget() -> None:
    steps = plan_steps(LENGTHS, 1024, epochs=1, seed=0)
    assert sorted(index for batch in steps for index in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) * max(LENGTHS[i] for i in batch) <= 1024 for batch in steps)


def test_lengths_are_rounded_to_few() -> None:
    found = {length: rounded(length) for length in range(1, 2049)}
    assert sorted(set(found.values())) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(length <= size and (size < 1.5 * length or size == 32) for length, size in found.items())
    steps = plan_steps(LENGTHS, 1024, epochs=1, seed=0)
    assert all(len(batch) <= 1024 // rounded(max(LENGTHS[i] for i in batch)) for batch in steps)


def test_epochs_differ_and_seeds_repeat() -> None:
    two = plan_steps(LENGTHS, 1024, epochs=2, seed=0)
    assert two == plan_steps(LENGTHS, 1024, epochs=2, seed=0)
    one = plan_steps(LENGTHS, 1024, epochs=1, seed=0)
    assert two[: len(one)] == one and two[len(one) : 2 * len(one)] != one


def test_example_longer_than_the_budget_is_alone() -> None:
    assert plan_pass([4, 50, 4], 10) == [[0, 2], [1]]
