"""Measures, memory and penalties of continual learning, against cases that are computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from molora.errors import ConfigError, DataError
from molora_training.continual import memory as module
from molora_training.continual.measures import Measures, measures
from molora_training.continual.memory import Memory, held_out, key
from molora_training.continual.penalties import elastic, fisher, orthogonal


def chat(number: int, length: int = 10) -> dict[str, object]:
    messages = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "x" * length}]
    return {"id": str(number), "messages": messages}


def test_measures_of_three_tasks() -> None:
    after = [[0.8, 0.3, 0.2], [0.9, 0.7, 0.4], [0.6, 0.5, 0.9]]
    found = measures(after, [0.1, 0.2, 0.1])
    # average (.6 + .5 + .9) / 3; backward ((.6 - .8) + (.5 - .7)) / 2; forgetting ((.9 - .6) + (.7 - .5)) / 2;
    # forward ((.3 - .2) + (.4 - .1)) / 2
    assert [found.average, found.backward, found.forgetting, found.forward] == pytest.approx([2 / 3, -0.2, 0.25, 0.2])


def test_a_task_that_is_never_lost_forgets_nothing() -> None:
    assert measures([[1.0, 0.0], [1.0, 1.0]], [0.0, 0.0]) == Measures(1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("after", [[[1.0]], [[1.0, 0.0]], [[1.0, 0.0], [1.0]]])
def test_scores_of_another_shape_are_named(after: list[list[float]]) -> None:
    with pytest.raises(DataError, match="need as many rows"):
        measures(after, [0.0] * len(after[0]))


def test_a_memory_does_not_know_order_or_repetition() -> None:
    rows = [chat(n) for n in range(200)]
    size = len(json.dumps(rows[150], ensure_ascii=False, sort_keys=True)) + 1
    limit = 40 * size
    once = Memory(limit=limit).with_(rows)
    assert 38 <= len(once.rows) <= 42
    piecemeal = Memory(limit=limit)
    for first in range(199, -1, -10):
        piecemeal = piecemeal.with_(rows[max(0, first - 15) : first + 1])
    assert piecemeal == once
    assert once.with_(once.rows) == once


def test_a_conversation_that_would_fill_a_memory_is_not_kept() -> None:
    rows = [chat(n) for n in range(20)]
    for number in range(8):  # wherever it comes in the order
        assert Memory(limit=4000).with_([*rows, chat(100 + number, 600)]) == Memory(limit=4000).with_(rows)


def test_a_memory_is_an_even_sample() -> None:
    rows = [chat(n) for n in range(4000)]
    kept = {int(str(row["id"])) for row in Memory(limit=60_000).with_(rows).rows}
    early = sum(number < 2000 for number in kept)
    # binomial: 4 standard deviations
    assert abs(early - len(kept) / 2) < 2 * np.sqrt(len(kept)) and len(kept) > 300


def test_the_same_fifth_is_held_out_in_every_memory() -> None:
    rows = [chat(n) for n in range(2000)]
    apart = {key(row) for row in rows if held_out(row)}
    assert 0.16 < len(apart) / 2000 < 0.24
    for part in (rows[:700], rows[300:]):
        found = Memory(limit=10**6).with_(part)
        assert {key(row) for row in found.kept_apart} == apart & {key(row) for row in part}
        assert not apart & {key(row) for row in found.taught}
        assert len(found.taught) + len(found.kept_apart) == len(part)


def test_a_memory_is_saved_within_its_limit_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    assert Memory.load(file) == Memory()
    found = Memory(limit=3000).with_([{**chat(n), "note": "ї"} for n in range(100)])
    found.save(file)
    assert 2800 < file.stat().st_size <= 3000 and Memory.load(file, 3000) == found
    assert len(Memory.load(file, 1000).rows) < len(found.rows)
    gone = key(found.rows[3])
    assert [key(row) for row in found.without([gone]).rows] == [key(r) for r in found.rows if key(r) != gone]


def test_what_is_no_conversation_is_named(tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    for bad in ("[1]", "{}", "not JSON", '{"messages": [{"role": "user"}]}', '{"messages": 3}'):
        file.write_text(json.dumps(chat(1)) + "\n" + bad + "\n")
        with pytest.raises(DataError, match=r"memory\.jsonl, line 2 is no conversation"):
            Memory.load(file)
    with pytest.raises(ConfigError, match="at least one byte"):
        Memory(limit=0)
    assert module.BYTES == 2**20


def test_elastic_by_hand() -> None:
    now = {"a": torch.tensor([1.0, 3.0], requires_grad=True), "b": torch.tensor([[2.0]])}
    was = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[5.0]])}
    weigh = {"a": torch.tensor([2.0, 0.5]), "b": torch.tensor([[1.0]])}
    found = elastic(now, was, weigh, 4.0)
    assert found.item() == pytest.approx(2 * (2 * 1 + 0.5 * 4 + 9))
    found.backward()
    assert now["a"].grad is not None and now["a"].grad.tolist() == pytest.approx([4 * 2 * 1, 4 * 0.5 * 2])


def test_fisher_of_a_logistic_regression() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    x, y = torch.randn(20, 3), (torch.rand(20) < 0.5).float()
    parameters = dict(layer.named_parameters())
    losses = [
        lambda row=row, label=label: nn.functional.binary_cross_entropy_with_logits(layer(row)[0], label)
        for row, label in zip(x, y, strict=True)
    ]
    found = fisher(parameters, losses)
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    # -d log p / d logit = p - y, in float64 and without autograd
    error = 1 / (1 + np.exp(-(x.double().numpy() @ weight[0] + bias))) - y.double().numpy()
    np.testing.assert_allclose(found["weight"][0], (error[:, None] * x.numpy()).__pow__(2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["bias"], [(error**2).mean()], rtol=1e-5)
    assert all(not of.requires_grad for of in found.values())
    assert all(bool((of == 0).all()) for of in fisher(parameters, []).values())


def test_orthogonal_by_hand() -> None:
    now = {"q": torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True), "v": torch.tensor([[1.0, 1.0]])}
    old = {"q": torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 5.0]])}  # it does not adapt v
    older = {"q": torch.tensor([[0.0, 0.0, 3.0]]), "v": torch.tensor([[1.0, -1.0]])}  # orthogonal to it
    found = orthogonal(now, [old, older], 0.5)
    assert found.item() == pytest.approx(0.5 * (1 + 2))
    found.backward()
    assert now["q"].grad is not None and now["q"].grad.tolist() == [[0.5, 0.5, -2.5]]
    assert orthogonal(now, [], 0.5).item() == 0
