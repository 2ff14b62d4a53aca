"""Two processes learn what one learns, step by step; a training goes on with another number; a failure ends all."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molora.errors import ConfigError
from molora_training import adapter, router
from molora_training.adapter_settings import LoraShape
from molora_training.data import Example, write_examples
from molora_training.data.lessons import Lesson, write_lessons
from molora_training.hypernet import document, text
from molora_training.hypernet.document_objective import DocumentLoss
from molora_training.processes import Processes
from molora_training.router_settings import LossWeights
from tests.conftest import write_adapter
from tests.training import test_adapter_trainer, test_document_hypernet, test_router_trainer, test_text_hypernet
from tests.training.launched import Training, launch, losses_of

LESSONS = [  # of one chunk to four, with one question to three
    Lesson("ab" * 12, (("Which?", "ab"), ("What?", "abab"), ("Who?", "b"))),
    Lesson("yz" * 90, (("Which?", "yz"),)),
    Lesson("mn" * 50, (("Which?", "mn"), ("Where?", "not here, but there"))),
]
RESUMED = ("router", "document")


def to(training: Training, name: str, **changes: Any) -> Training:
    """The same training, to another folder."""
    out = training.settings.out.with_name(name)
    return dataclasses.replace(training, settings=dataclasses.replace(training.settings, out=out), **changes)


def make_trainings(folder: Path) -> dict[str, Training]:
    for name in ("router", "document", "text"):
        (folder / name).mkdir()
    routed = test_router_trainer.make_settings(folder / "router")
    every = dataclasses.replace(
        routed,
        router=dataclasses.replace(routed.router, reads=(0, 1)),
        loss=LossWeights(lm=1.0, distil=0.5, balance=0.1, entropy=0.01),
        null_start=2,
        max_steps=6,
        checkpoint_every=3,
    )
    # A long conversation is a step alone, and one of the two processes then has none.
    narrow = dataclasses.replace(routed, batch_tokens=128, max_steps=10, checkpoint_every=5)
    base = test_document_hypernet.make_base(folder / "document")
    made = test_document_hypernet.make_settings(base, folder / "document")
    for split in ("train", "validation"):
        write_lessons(folder / "document" / "data" / f"passages.{split}.jsonl", LESSONS)
    talk = ({"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes, and you?"})
    write_examples(folder / "document" / "data" / "talk.train.jsonl", [Example("t", "talk", "train", talk)])
    of_documents = dataclasses.replace(
        made,
        loop=dataclasses.replace(made.loop, steps=6, checkpoint_every=3),
        loss=DocumentLoss(gold=1.0, distil=0.5, l1=0.1, keep=0.3, apart=0.4, sparse=0.2),
        apart=("talk",),
        texts=3,
    )
    of_texts = dataclasses.replace(test_text_hypernet.make_settings(folder / "text"), groups=3)
    encoder = {"encoder": test_text_hypernet.encoder}
    for seed, name in enumerate(("ann", "bob")):
        given = AutoModelForCausalLM.from_pretrained(of_texts.base)
        write_adapter(given, folder / "text" / "given" / name, seed, r=4, lora_alpha=6)
    of_adapters = dataclasses.replace(of_texts, way="reconstruct", adapters=folder / "text" / "given")
    (folder / "adapter" / "base").mkdir(parents=True)
    adapted = test_adapter_trainer.make_settings(
        test_adapter_trainer.make_base(folder / "adapter" / "base"), folder / "adapter"
    )
    # A step is one example, and one of the processes has no gradient at all.
    of_adapter = dataclasses.replace(adapted, lora=LoraShape(rank=4, alpha=8), batch_tokens=32, max_steps=5)
    trainings = {
        "adapter": Training(adapter.train, of_adapter),
        "router": Training(router.train, every),
        "narrow": Training(router.train, narrow),
        "document": Training(document.train, of_documents),
        "text": Training(text.train, of_texts, more=encoder),
        "reconstruct": Training(text.train, of_adapters, more=encoder),
    }
    return {name: to(training, name) for name, training in trainings.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the tests run, since checkpoints go to a folder there."""
    path = tmp_path_factory.mktemp("processes")
    with chdir(path):
        yield path


@pytest.fixture(scope="module")
def trainings(folder: Path) -> dict[str, Training]:
    return make_trainings(folder)


@pytest.fixture(scope="module")
def alone(trainings: dict[str, Training]) -> dict[str, list[float]]:
    """What one process does: the losses of each training, whose result lies where it says."""
    return {name: training.run() for name, training in trainings.items()}


@pytest.fixture(scope="module")
def together(folder: Path, trainings: dict[str, Training]) -> dict[str, list[float]]:
    """What two processes do: each training, those that one has begun, and the beginnings of what one then ends."""
    begun = {f"{name}-from-one": to(trainings[name], f"{name}-from-one") for name in RESUMED}
    for training in begun.values():
        assert len(dataclasses.replace(training, stop=4).run()) == 4
    whole = {name: to(training, f"{name}-two") for name, training in trainings.items()}
    left = {f"{name}-from-two": to(trainings[name], f"{name}-from-two", stop=4) for name in RESUMED}
    launched = {**whole, **begun, **left}
    done = launch(2, list(launched.values()), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(launched, losses_of(folder), strict=True))


def assert_same(found: Path, wanted: Path) -> None:
    """The weights of two results; a single one that hardly learns may differ more: AdamW enlarges small gradients."""
    files = sorted(file.relative_to(wanted) for file in wanted.rglob("*.safetensors"))
    assert files
    for file in files:
        own, other = load_file(found / file), load_file(wanted / file)
        assert own.keys() == other.keys()
        for name, tensor in other.items():
            if tensor.dtype in (torch.float16, torch.bfloat16):  # may be rounded to the neighbour
                torch.testing.assert_close(own[name], tensor, rtol=torch.finfo(tensor.dtype).eps, atol=1e-5)
            else:
                assert (own[name] - tensor).float().norm() <= 1e-5 * tensor.float().norm(), name


@pytest.mark.parametrize("name", ["adapter", "router", "narrow", "document", "text", "reconstruct"])
def test_two_processes_learn_what_one_learns(
    name: str, trainings: dict[str, Training], alone: dict[str, list[float]], together: dict[str, list[float]]
) -> None:
    assert together[name] == pytest.approx(alone[name], rel=1e-5) and len(set(alone[name])) > 3
    out = trainings[name].settings.out
    assert_same(out.with_name(f"{name}-two"), out)
    own, both = (json.loads(next(one.glob("*metrics.json")).read_text()) for one in (out, out.with_name(f"{name}-two")))
    judged = "validation_loss" if name == "adapter" else "validation"
    assert both[judged] == pytest.approx(own[judged], rel=1e-5) and (own["processes"], both["processes"]) == (1, 2)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_where_one_was_stopped(
    name: str, trainings: dict[str, Training], alone: dict[str, list[float]], together: dict[str, list[float]]
) -> None:
    assert together[f"{name}-from-one"] == pytest.approx(alone[name][3:], rel=1e-5)  # from the checkpoint of step 3
    assert_same(trainings[name].settings.out.with_name(f"{name}-from-one"), trainings[name].settings.out)


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_were_stopped(
    name: str,
    trainings: dict[str, Training],
    alone: dict[str, list[float]],
    together: dict[str, list[float]],
) -> None:
    assert together[f"{name}-from-two"] == pytest.approx(alone[name][:4], rel=1e-5)
    training = to(trainings[name], f"{name}-from-two")
    assert training.run() == pytest.approx(alone[name][3:], rel=1e-5)
    assert_same(training.settings.out, trainings[name].settings.out)


def test_a_process_that_fails_ends_all_with_its_message(
    folder: Path, trainings: dict[str, Training], alone: dict[str, list[float]]
) -> None:
    training = to(trainings["router"], "failed")
    done = launch(2, [dataclasses.replace(training, stop=4, fail=1)], folder)
    assert done.returncode != 0 and "MemoryError: This process has no memory left." in done.stderr
    assert not training.settings.out.exists()
    assert training.run() == pytest.approx(alone["router"][3:], rel=1e-5)


def test_each_process_needs_something_to_do() -> None:
    processes = Processes()
    processes.need(1, "texts")
    processes.count = 4
    with pytest.raises(
        ConfigError, match="There are 4 processes, and a step has 3 texts: start fewer processes, or set"
    ):
        processes.need(3, "texts")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_is_shared_is_done_once(count: int) -> None:
    processes = Processes()
    processes.count = count
    owned: list[int] = []
    stretches: list[int] = []
    for processes.rank in range(count):
        owned += processes.own(range(7))
        stretches += processes.stretch(7)
    assert sorted(owned) == stretches == list(range(7))
