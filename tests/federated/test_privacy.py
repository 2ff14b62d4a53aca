"""The noise of DP-FTRL: a tree's nodes and sums have the variance that the accountant is told, and turns are kept."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from molora_training.federated import private
from molora_training.federated.accounting import trees
from molora_training.federated.lora import Lora
from molora_training.federated.private import QUANTA, Private
from molora_training.federated.settings import PrivacySettings
from molora_training.federated.tree import TreeNoise, nodes

SIZE = 40_000
STD = 0.3
# A variance over SIZE draws is off by sqrt(2 / SIZE) = 0.7% of itself, one in 16,000 times by four times as much.
TOLERANCE = 4 * math.sqrt(2 / SIZE)


@pytest.mark.parametrize("step", range(1, 70))
def test_the_nodes_of_a_sum_cover_its_steps_once(step: int) -> None:
    covered = [index for level, place in nodes(step) for index in range(place << level, (place + 1) << level)]
    assert sorted(covered) == list(range(step)) and len(nodes(step)) == step.bit_count()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 16, 33])
def test_a_step_is_in_no_more_nodes_than_the_accountant_counts(steps: int) -> None:
    """Of all nodes that are ever used, a step is below one of each level at most."""
    used = set(itertools.chain.from_iterable(nodes(step) for step in range(1, steps + 1)))
    for step in range(steps):
        above = [(level, place) for level, place in used if place << level <= step < (place + 1) << level]
        assert len(above) <= math.ceil(math.log2(steps)) + 1 and len({level for level, _ in above}) == len(above)


def test_each_prefix_has_the_noise_of_its_nodes() -> None:
    tree = TreeNoise(STD, SIZE, b"seed")
    sums = [tree.next() for _ in range(16)]
    for step, noise in enumerate(sums, 1):
        expected = STD**2 * step.bit_count()
        assert float(noise.double().var()) == pytest.approx(expected, rel=TOLERANCE), step
        assert abs(float(noise.double().mean())) < 4 * math.sqrt(expected / SIZE)
    for one, other in itertools.combinations(range(1, 17), 2):
        common = len(set(nodes(one)) & set(nodes(other)))
        found = float((sums[one - 1].double() * sums[other - 1].double()).mean())
        most = STD**2 * math.sqrt(one.bit_count() * other.bit_count() + common**2)
        assert abs(found - STD**2 * common) < 5 * most / math.sqrt(SIZE), (one, other)


def test_each_node_is_gaussian_and_its_own() -> None:
    """Kolmogorov and Smirnov's distance of the draws of a node from N(0, std^2)."""
    tree = TreeNoise(STD, SIZE, b"seed")
    every = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    draws = {node: tree._node(node).double() for node in every}
    for draw in draws.values():
        ordered = draw.sort().values / STD
        theory = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
        empirical = torch.arange(1, SIZE + 1, dtype=torch.float64) / SIZE
        assert float((theory - empirical).abs().max()) < 1.95 / math.sqrt(SIZE)  # exceeded in one of 1,000
    for one, other in itertools.combinations(every, 2):
        assert abs(float((draws[one] * draws[other]).mean())) < 5 * STD**2 / math.sqrt(SIZE)


def test_the_state_of_a_tree_is_logarithmic_and_can_be_resumed() -> None:
    tree, sums = TreeNoise(1.0, 10, b"seed"), []
    for step in range(1, 65):
        sums.append(tree.next())
        assert len(tree.kept) == step.bit_count() <= 7
    again = TreeNoise(1.0, 10, b"seed", step=37)
    assert torch.equal(again.next(), sums[37]) and torch.equal(again.next(), sums[38])
    assert not torch.equal(TreeNoise(1.0, 10, b"other").next(), sums[0])


def lora() -> Lora:
    return Lora({"q": (torch.ones(4, 6), torch.zeros(2000, 4)), "v": (torch.ones(4, 6), torch.zeros(500, 4))}, 2.0)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the accountant, which is a package of its own."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 1.5)


HOW = PrivacySettings(epsilon=8.0, clip=0.5, cohorts=4)


def changes(size: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(b, size) for name, (_, b) in lora().pairs.items()}


def entries(one: Lora) -> torch.Tensor:
    return torch.cat([b.flatten() for _, b in one.pairs.values()])


def test_what_serves_is_the_sum_and_the_trees_noise(known: None) -> None:
    """theta_t = theta_0 + (G_t + N_t) / n, over two trees; the second begins where the first ended."""
    own = Private.begin(HOW, 8, lora())
    clients = [f"c{number}" for number in range(20)]
    total, ended = 0.0, 0.0
    for step in range(1, 9):
        turn = own.cohort(clients)
        assert len(turn) == 5 and own.expected == 5
        found = entries(own.step(changes(0.01 * step), turn)).double()
        total += 0.01 * step / 5
        within = (step - 1) % 4 + 1
        variance = (1.5 * 0.5 / 5) ** 2 * within.bit_count() + ended
        off = found - total
        assert float(off.mean()) == pytest.approx(0, abs=4 * math.sqrt(variance / 10_000))
        assert float(off.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / 10_000)), step
        if within == 4:
            ended = variance  # of what the next tree begins with: the noise of a whole tree is one node's
    assert own.noise == pytest.approx(1.5 * 0.5 / 5)


def test_the_noise_that_is_told_is_that_of_a_round(known: None) -> None:
    """Also where cohorts outnumber the clients, and a round is expected to have half of one."""
    own = Private.begin(HOW, 8, lora())
    found = entries(own.step(changes(0.0), own.cohort(["a", "b"]))).double()
    assert own.expected == 0.5
    assert float(found.std()) == pytest.approx(own.noise, rel=4 * math.sqrt(1 / 20_000))


def test_a_client_has_one_turn_in_a_tree(known: None) -> None:
    own = Private.begin(HOW, 8, lora())
    clients = [f"c{number}" for number in range(10)]
    for _ in range(2):
        turns: list[str] = []
        for step in range(4):
            there = [*clients, "late"] if step else clients
            turn = own.cohort(there)
            assert not set(turn) & set(turns)
            turns += turn
            own.step(changes(0.0), turn)
        assert sorted(turns) == sorted([*clients, "late"])


def test_who_did_not_answer_may_still_have_its_turn(known: None) -> None:
    own = Private.begin(HOW, 8, lora())
    clients = [f"c{number}" for number in range(8)]
    first = own.cohort(clients)
    own.step(changes(0.0), first[:1])
    later = []
    for _ in range(3):
        turn = own.cohort(clients)
        later += turn
        own.step(changes(0.0), turn)
    assert first[1] in later and first[0] not in later


def test_it_goes_on_with_the_same_noise(known: None) -> None:
    own = Private.begin(HOW, 8, lora())
    for _ in range(2):
        own.step(changes(0.1), own.cohort([f"c{number}" for number in range(20)]))
    again = Private.read(HOW, own.state(), own.tensors())
    turn = own.cohort([f"c{number}" for number in range(20)])
    assert again.cohort([f"c{number}" for number in range(20)]) == turn
    assert torch.equal(entries(own.step(changes(0.2), turn)), entries(again.step(changes(0.2), turn)))


def test_two_trainings_have_different_noise(known: None) -> None:
    one, other = (entries(_begun().step(changes(0.0), ["c"])) for _ in range(2))
    assert not torch.equal(one, other)


def _begun() -> Private:
    own = Private.begin(HOW, 8, lora())
    own.cohort(["c"])
    return own


def test_rounding_of_masked_sums_is_paid_for(known: None) -> None:
    plain = Private.begin(HOW, 8, lora()).noise_tree.std
    masked = Private.begin(replace(HOW, secure=True), 8, lora()).noise_tree.std
    assert plain == 1.5 * 0.5 and masked == pytest.approx(1.5 * (0.5 + 1.0 / QUANTA * math.sqrt(10_000)))


@pytest.mark.parametrize(
    ("rounds", "cohorts", "expected"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 1, [1, 1, 1]), (2, 5, [2])]
)
def test_rounds_are_cut_into_trees(rounds: int, cohorts: int, expected: Any) -> None:
    assert trees(rounds, cohorts) == expected
