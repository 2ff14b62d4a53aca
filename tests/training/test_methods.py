"""Ways of learning without forgetting, against what is computed by hand from PEFT's own model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from molora.errors import ConfigError
from molora_training.continual.growth import recompress, widen
from molora_training.continual.method import Method, Task
from molora_training.continual.methods import EVERY, Distil, Elastic, Orthogonal
from molora_training.continual.steady import ROWS, Steady
from molora_training.data import IGNORED, collate
from tests.conftest import make_base
from tests.training.tasks import learner, make_task, rows_of, saying, trainable


def make_adapter(folder: Path, rank: int = 4, rslora: bool = False, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=6.0, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_base(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Of each module what PEFT adds to its weight, float64."""
    model: Any = PeftModel.from_pretrained(make_base().double(), folder, autocast_adapter_dtype=False)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_grows_says_the_same(rslora: bool, tmp_path: Path) -> None:
    before = make_adapter(tmp_path / "before", rslora=rslora)
    widen(before, 3, tmp_path / "wider")
    assert json.loads((tmp_path / "wider" / "adapter_config.json").read_text())["r"] == 7
    wider = deltas(tmp_path / "wider")
    for name, delta in deltas(before).items():
        torch.testing.assert_close(wider[name], delta, rtol=1e-6, atol=1e-9)
    grown = load_file(tmp_path / "wider" / "adapter_model.safetensors")
    assert all(tensor[4:].abs().sum() > 0 for name, tensor in grown.items() if "lora_A" in name)
    with pytest.raises(ConfigError, match="one rank or more"):
        widen(before, 0, tmp_path / "none")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_cut_is_the_nearest_of_its_rank(rank: int, rslora: bool, tmp_path: Path) -> None:
    before = make_adapter(tmp_path / "before", rslora=rslora)
    told = recompress(before, rank, tmp_path / "cut")
    cut, lost, every = deltas(tmp_path / "cut"), 0.0, 0.0
    for name, delta in deltas(before).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        torch.testing.assert_close(cut[name], u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-6)
        lost, every = lost + float(s[rank:].square().sum()), every + float(s.square().sum())
    assert told == pytest.approx((lost / every) ** 0.5, abs=1e-6)
    with pytest.raises(ConfigError, match="is cut to 1 to 4 ranks"):
        recompress(before, 5, tmp_path / "more")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(tmp_path)


def by_hand(task: Task, served: Path) -> dict[str, torch.Tensor]:
    """The mean over examples of the squared gradient of their answers' summed loss."""
    model = learner(task, served).eval()
    squares: dict[str, torch.Tensor] = {}
    for row in rows_of(task):
        model.zero_grad()
        logits = model(input_ids=row.input_ids[None]).logits[0, :-1]
        answer = row.labels[1:] != IGNORED
        nn.functional.cross_entropy(logits[answer], row.labels[1:][answer], reduction="sum").backward()
        for name, p in trainable(model).items():
            squares[name] = squares.get(name, 0) + p.grad.square() / len(task.examples)
    return squares


def test_elastic_keeps_what_mattered(task: Task, tmp_path: Path) -> None:
    served = tmp_path / "adapters" / "math"
    method = Elastic(task)
    model = learner(task, served)
    method.prepare(model)
    batch = collate(rows_of(task), 0)
    assert method.penalty(model, batch) is None  # nothing came before
    method.keep(served)
    information = by_hand(task, served)
    found = load_file(task.state)
    assert found.keys() == information.keys()
    for name, tensor in information.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)

    later = Elastic(task)
    later.prepare(model)
    assert float(later.penalty(model, batch)) == 0.0
    moved = {name: torch.randn_like(p) / 10 for name, p in trainable(model).items()}
    with torch.no_grad():
        for name, p in trainable(model).items():
            p += moved[name]
    expected = 200 * sum((information[name] * step.square()).sum() for name, step in moved.items())
    torch.testing.assert_close(later.penalty(model, batch), expected, rtol=1e-4, atol=1e-6)
    later.keep(served)
    for name, tensor in load_file(task.state).items():
        torch.testing.assert_close(tensor, 1.9 * information[name], rtol=1e-4, atol=1e-7)


def test_elastic_knows_nothing_of_another_shape(task: Task, tmp_path: Path) -> None:
    method = Elastic(task)
    method.keep(tmp_path / "adapters" / "math")
    widen(tmp_path / "adapters" / "math", 2, tmp_path / "wider")
    model = learner(task, tmp_path / "wider")
    later = Elastic(task)
    later.prepare(model)
    assert later.penalty(model, collate(rows_of(task), 0)) is None


def test_orthogonal_ranks_leave_the_older_ones(task: Task, tmp_path: Path) -> None:
    served = tmp_path / "adapters" / "math"
    method = Orthogonal(task)
    model = learner(task, method.start(served, tmp_path))
    method.prepare(model)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    batch = collate(rows_of(task), 0)
    read = [p for name, p in before.items() if "lora_A" in name]
    expected = sum((p[method.older :] @ p[: method.older].T).abs().sum() for p in read) / 2
    torch.testing.assert_close(method.penalty(model, batch).detach(), expected)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        (loss + method.penalty(model, batch)).backward()
        optimizer.step()
    for name, p in trainable(model).items():
        now, was = (p, before[name]) if "lora_A" in name else (p.T, before[name].T)
        assert torch.equal(now[: method.older], was[: method.older])
        assert not torch.equal(now[method.older :], was[method.older :])


def test_what_has_grown_too_far_is_cut(task: Task, tmp_path: Path) -> None:
    method = Orthogonal(task)
    kept, grown = make_adapter(tmp_path / "kept", 56), make_adapter(tmp_path / "grown", 57)
    assert method.finish(kept, tmp_path) == kept
    cut = method.finish(grown, tmp_path)
    assert json.loads((cut / "adapter_config.json").read_text())["r"] == method.most // 2


@pytest.mark.parametrize("own", [Distil, Method])
def test_what_is_general_is_held_to_the_base(own: type[Method], task: Task, tmp_path: Path) -> None:
    """Over two steps it comes to all of six conversations, a few at a time, beside what the method holds itself."""
    served = tmp_path / "adapters" / "math"
    model = learner(task, served).eval()
    general = [row for n in range(3) for row in rows_of(saying(task, "yes" * n + "no"))][:6]
    alone = own(task)
    alone.prepare(model)
    steady = Steady(own(task), general)
    steady.prepare(model)
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learns == [name for name, p in learner(task, served).named_parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable(model).values():
            p += torch.randn_like(p) / 20
    batch = collate(rows_of(task), 0)
    before = float(alone.penalty(model, batch).detach()) if own is Distil else 0.0
    for turn in range(2):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in (general[(turn * ROWS + n) % len(general)] for n in range(ROWS)):
            ids = row.input_ids.unsqueeze(0)
            q = model(input_ids=ids).logits.double().log_softmax(-1)
            with torch.no_grad(), model.disable_adapter():
                p = model(input_ids=ids).logits.double().log_softmax(-1)
            said = row.labels[1:] != IGNORED
            total = total + (p.exp() * (p - q)).sum(-1)[0, :-1][said].sum()
            count += int(said.sum())
        found = steady.penalty(model, batch)
        assert float(total) > 1e-3 * count
        torch.testing.assert_close(
            found.detach().double(), before + steady.strength * total.detach() / count, rtol=1e-4, atol=1e-6
        )
        mine = torch.autograd.grad(found, list(trainable(model).values()), retain_graph=True)
        if own is Method:
            theirs = torch.autograd.grad(steady.strength * total / count, list(trainable(model).values()))
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_is_distilled_is_the_questions(task: Task, tmp_path: Path) -> None:
    served = tmp_path / "adapters" / "math"
    model = learner(task, served).eval()
    teacher = copy.deepcopy(model)
    method = Distil(task)
    method.prepare(model)
    batch = collate(rows_of(task), 0)
    assert float(method.penalty(model, batch).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in trainable(model).values():
            p += torch.randn_like(p) / 20
        asked = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        p, q = (one(**asked).logits.double().log_softmax(-1) for one in (teacher, model))
    divergences = []
    for row in range(len(batch.input_ids)):
        for t in range(0, batch.input_ids.shape[1], EVERY):
            last = t + 1 == batch.input_ids.shape[1]
            if batch.attention_mask[row, t] and (last or batch.labels[row, t + 1] == IGNORED):
                divergences.append((p[row, t].exp() * (p[row, t] - q[row, t])).sum())
    found = method.penalty(model, batch)
    torch.testing.assert_close(found.detach().double(), torch.stack(divergences).mean(), rtol=1e-4, atol=1e-7)
