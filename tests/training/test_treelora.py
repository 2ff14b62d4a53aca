"""TreeLoRA against numpy: the tree, the bandit's bounds, what is compared, and what draws to an earlier task."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from molora_training.continual.growth import widen
from molora_training.continual.method import Task
from molora_training.continual.tree import Bandit, Node, split
from molora_training.continual.treelora import ENTRIES, TreeLora, thinned
from molora_training.data import IGNORED, collate
from tests.training.tasks import learner, make_task, rows_of, saying, trainable


def test_a_tree_parts_tasks_at_the_median() -> None:
    first = [[4, 0], [3, 1], [0, 1], [1, 0]]  # mean (2, 0.5): products 8, 6.5, 0.5, 2; the lower median is 2
    second = [[1, 0], [0, 3], [9, 9], [0, 2]]  # of tasks 0, 1 and 3 mean (1, 5) / 3: 1/3, 5, 10/3; the median is 10/3
    root = split(torch.tensor([first, second]).float().transpose(0, 1), (0, 1, 2, 3))
    assert root.near == Node((0, 1, 3), Node((1, 3)), Node((0,))) and root.far == Node((2,))
    alike = split(torch.ones(3, 1, 2), (0, 1, 2))
    assert alike == Node((0, 1, 2), Node((0,)), Node((1, 2)))


def test_a_bandit_follows_its_bounds() -> None:
    rng = np.random.default_rng(0)
    known, samples = rng.standard_normal((2, 3, 5)), rng.standard_normal((12, 3, 5)) / 4
    samples += known[1]
    bandit = Bandit(torch.from_numpy(known), len(samples))
    assert sorted(len(child.tasks) for child in (bandit.root.near, bandit.root.far) if child) == [1, 1]
    first = bandit.root.near.tasks[0] if bandit.root.near else -1
    costs: list[list[np.ndarray]] = [[], []]
    for t, sample in enumerate(samples):
        bounds = [
            np.mean(costs[k]) - math.sqrt(math.log(2 * 12 * (t + 1) * (t + 2)) / (2 * len(costs[k])))
            if costs[k]
            else -math.inf
            for k in range(2)
        ]
        expected = first if t == 0 else int(np.argmin(bounds))
        assert [bandit.bound((k,)) for k in range(2)] == pytest.approx(bounds)
        assert bandit.see(torch.from_numpy(sample)) == expected
        one, other = (x / np.abs(x).sum(1, keepdims=True) for x in (sample, known[expected]))
        costs[expected].append(np.abs(one - other).sum(1) / 2)
    assert len(costs[1]) > len(costs[0]) > 0
    means = np.stack([np.mean(one, 0) for one in costs])
    assert bandit.nearest() == means.argmin(0).tolist()


def test_of_a_wide_module_every_third_entry_is_compared() -> None:
    gradients = {f"x.lora_{one}.default.weight": torch.randn(4, 300) for one in "AB"}
    gradients |= {f"y.lora_{one}.default.weight": torch.randn(2, 3) for one in "AB"}
    whole = np.concatenate([gradients[f"x.lora_{one}.default.weight"].numpy().ravel() for one in "AB"])
    found = thinned(gradients, ["x", "y"]).numpy()
    np.testing.assert_array_equal(found[0, :800], whole[0::3])
    narrow = np.concatenate([gradients[f"y.lora_{one}.default.weight"].numpy().ravel() for one in "AB"])
    np.testing.assert_array_equal(found[1, :12], narrow)
    assert not found[0, 800:].any() and not found[1, 12:].any()


def gradient_of(task: Task, served: Path) -> dict[str, torch.Tensor]:
    """The mean over examples of the gradient of their answers' summed loss."""
    model = learner(task, served).eval()
    for row in rows_of(task):
        logits = model(input_ids=row.input_ids[None]).logits[0, :-1]
        answer = row.labels[1:] != IGNORED
        nn.functional.cross_entropy(logits[answer], row.labels[1:][answer], reduction="sum").backward()
    return {name: p.grad / len(task.examples) for name, p in trainable(model).items()}


def test_it_is_drawn_to_the_task_that_is_most_alike(tmp_path: Path) -> None:
    first = make_task(tmp_path)
    second, again = saying(first, "7 xyz 7 xyz"), first
    served = {"ab": tmp_path / "adapters" / "math", "xyz": tmp_path / "adapters" / "code"}
    for task, version in ((first, "ab"), (second, "xyz")):
        method = TreeLora(task)
        model = learner(task, served["ab"])
        method.prepare(model)
        if task is first:
            assert method.penalty(model, collate(rows_of(task), 0)) is None  # nothing came before
        method.keep(served[version])
    state = load_file(first.state)
    assert state["gradients"].shape == (2, 3 * 7, ENTRIES)
    gradient = gradient_of(first, served["ab"])
    for name, row in zip(method.layers, state["gradients"][0], strict=True):
        whole = [gradient[f"{name}.lora_{one}.default.weight"].flatten() for one in "AB"]
        torch.testing.assert_close(row[: sum(map(len, whole))], torch.cat(whole), rtol=1e-4, atol=1e-6)
        assert row[sum(map(len, whole)) :].abs().sum() == 0
    learnt = {key: load_file(folder / "adapter_model.safetensors") for key, folder in served.items()}

    later = TreeLora(again)
    model = learner(again, served["ab"])
    later.prepare(model)
    for name, towards in later.towards.items():  # the same examples, so the first task is the nearest everywhere
        assert torch.equal(towards, learnt["ab"][f"{name}.lora_A.weight"])
    with torch.no_grad():
        for p in trainable(model).values():
            p += torch.randn_like(p) / 10
    reads = {name: p for name, p in trainable(model).items() if "lora_A" in name}
    pairs = [(p.detach().double(), learnt["ab"][name.replace(".default", "")].double()) for name, p in reads.items()]
    likeness = sum((p * towards).sum() for p, towards in pairs)
    penalty = later.penalty(model, collate(rows_of(again), 0))
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(-0.5 * float(likeness / (abs(likeness) + 1e-5)), abs=1e-6)
    for p, (_, towards) in zip(reads.values(), pairs, strict=True):
        torch.testing.assert_close(p.grad.double(), -0.5 * towards / (abs(likeness) + 1e-5), rtol=1e-4, atol=1e-8)

    for name, towards in after(saying(first, "7 xyz 7 xyz"), served["ab"]).items():
        assert torch.equal(towards, learnt["xyz"][f"{name}.lora_A.weight"])


def after(task: Task, served: Path) -> dict[str, torch.Tensor]:
    method = TreeLora(task)
    method.prepare(learner(task, served))
    return method.towards


def test_it_knows_the_last_tasks_and_none_of_another_shape(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    served = tmp_path / "adapters" / "math"
    for _ in range(3):
        method = TreeLora(task)
        method.most = 2
        method.prepare(learner(task, served))
        method.keep(served)
    assert {len(tensor) for tensor in load_file(task.state).values()} == {2}
    widen(served, 2, tmp_path / "wider")
    assert after(task, tmp_path / "wider") == {}
