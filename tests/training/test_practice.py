"""Practising what a person said of themselves: told in new wordings, beside earlier facts, or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.adapter import Adapter
from molora.base import load_base
from molora_training.continual.steady import Steady
from molora_training.plum.facts import Fact
from molora_training.plum.learner import Learner, Learning
from molora_training.plum.practice import Practised, against, encoded, pairs_of, practise, share_right
from molora_training.plum.segments import SegmentWeights
from molora_training.plum.told import told
from tests.unit.spoken import teachable

HELD = ["Is it red?", "And now?"]
EVERYDAY = [("Is it old?", "It is new.")]
FOUND = Practised(4, (3.0, 1.0), (0.0, 1.0), (1.0, 0.8), 0.1, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teachable(tmp_path_factory.mktemp("practice"))


def facts_of(text: str) -> list[Fact]:
    return told([{"role": "user", "content": text}])


def test_a_fact_is_told_in_wordings_that_were_not_practised(base: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    how = Learning(learning_rate=1e-2, epochs=60, rank=8, pull=0.0, weights=SegmentWeights())
    (dog,), (city,) = facts_of("My dog is Bo."), facts_of("I live in Bergen.")
    assert not set(dog.taught) & set(dog.apart)
    found = practise(
        str(base), base.parent / "blank", tmp_path / "one", [dog], [], HELD, EVERYDAY, how, lambda *at: steps.append(at)
    )
    assert found.questions == 2 and found.right == (0.0, 1.0) and found.loss[1] < 1 < found.loss[0]
    assert found.older is None and found.steps == len(steps) and steps[-1] == (found.steps - 1, found.steps)
    assert against(found, 1e9) == "" and Adapter.load(tmp_path / "one").ranks[0] == 8
    more = practise(
        str(base), tmp_path / "one", tmp_path / "two", [city], [dog], HELD, EVERYDAY, replace(how, epochs=1), None
    )
    assert more.older is not None and more.older[0] == 1.0 and more.right[0] == 0.0
    assert len({pair.question for pair in pairs_of([dog, city])}) == len(dog.taught) + len(city.taught)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"older": None}, ""),
        ({"loss": (1.0, 1.0)}, "nothing was learnt"),
        ({"loss": (1.0, float("nan"))}, "nothing was learnt"),
        ({"right": (0.0, 0.0)}, "nothing was learnt: 0% of the new questions"),
        ({"right": (0.5, 0.25)}, "nothing was learnt: 25% of the new questions are answered right, 50% before"),
        ({"right": (1.0, 1.0)}, ""),  # the same told once more
        ({"everyday": 0.26}, "26.0% worse at everyday talk, which may be 25.0% at most"),
        ({"everyday": float("nan")}, "everyday talk"),
        ({"older": (1.0, 0.7)}, "70% of it is answered right, 100% before"),
        ({"older": (0.0, 0.0)}, ""),
    ],
)
def test_what_may_not_serve(changed: dict[str, object], why: str) -> None:
    found = against(replace(FOUND, **changed), 0.25)  # type: ignore[arg-type]
    assert why in found and bool(found) == bool(why)


def learner_of(base: Path, **how: Any) -> Learner:
    model, tokenizer = load_base(str(base), dtype=torch.float32)
    settings = Learning(rank=8, pull=0.0, **how)
    return Learner(model.requires_grad_(False), tokenizer, base.parent / "blank", settings, str(base))


def test_everything_else_is_held_to_what_the_base_says(base: Path) -> None:
    drifts = []
    for held in (False, True):
        learner = learner_of(base, learning_rate=1e-2, epochs=8)
        steady = Steady(None, encoded([("Is it red?", "It is blue."), ("And now?", "Yes.")], learner.tokenizer))
        learner.learn(pairs_of(facts_of("My dog is Bo.")), None, steady if held else None)
        steady.prepare(learner.model)
        drifts.append(float(steady.drift(learner.model).detach()))
    assert 0 < drifts[1] < drifts[0] / 2


def test_answers_do_not_depend_on_what_else_is_asked(base: Path) -> None:
    learner = learner_of(base)
    questions = ["Is it?", "What is the name of the dog that lives next door?"]
    assert learner.answers(questions, 5) == [learner.answers([one], 5)[0] for one in questions]
    assert share_right(learner, []) == 0.0
