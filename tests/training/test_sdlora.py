"""SD-LoRA against its formula in float64, while it learns and as PEFT's own adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molora_training.continual.method import Task
from molora_training.continual.sdlora import SDLora
from molora_training.data import collate
from tests.training.tasks import learner, make_task, rows_of, trainable

SCALE = 2.0  # alpha 8 over rank 4


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return make_task(tmp_path)


def written(model: Any, folder: Path) -> Path:
    """All that learnt, as the trainer writes it."""
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=dict(model.named_parameters()))
    return folder


def by_formula(parameters: dict[str, torch.Tensor], name: str, blocks: list[int]) -> torch.Tensor:
    """fixed + sum of alpha_i B_i A_i / (|B_i| |A_i|) + alpha_t s B_t A_t, [out, in], float64."""
    a, b, alpha = (
        parameters[f"{name}.{one}"].detach().double()
        for one in ("lora_A.default.weight", "lora_B.default.weight", "lora_A.default.magnitudes")
    )
    ends = [sum(blocks[: n + 1]) for n in range(len(blocks))] + [len(a)]
    delta = SCALE * b[:, : blocks[0]] @ a[: blocks[0]]
    for i in range(1, len(blocks)):
        a_i, b_i = a[ends[i - 1] : ends[i]], b[:, ends[i - 1] : ends[i]]
        delta += alpha[i - 1] * b_i @ a_i / (b_i.square().sum().sqrt() * a_i.square().sum().sqrt())
    return delta + alpha[-1] * SCALE * b[:, ends[-2] :] @ a[ends[-2] :]


def plain(task: Task, deltas: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the base with its weights changed, float64."""
    model = AutoModelForCausalLM.from_pretrained(task.base).double().eval()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name.removeprefix("base_model.model.")).weight += delta
        found: torch.Tensor = model(ids).logits
    return found


def test_two_tasks_are_the_formula(task: Task, tmp_path: Path) -> None:
    served, blocks = tmp_path / "adapters" / "math", [4]
    rows = rows_of(task)
    batch = collate(rows, 0)
    for number in range(3):
        work = tmp_path / str(number)
        work.mkdir()
        method = SDLora(task)
        start = method.start(served, work)
        model = learner(task, start)
        method.prepare(model)
        parameters = trainable(model)
        magnitudes = {name: p for name, p in parameters.items() if "magnitudes" in name}
        assert all(torch.equal(p, torch.full((number + 1,), 0.8)) for p in magnitudes.values()) and magnitudes
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.05, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
            optimizer.step()
        for name, p in parameters.items():
            if "magnitudes" in name:
                assert (p != before[name]).all()  # those of older tasks too
                continue
            now, was = (p, before[name]) if "lora_A" in name else (p.T, before[name].T)
            assert torch.equal(now[: method.older], was[: method.older])
            assert not torch.equal(now[method.older :], was[method.older :])
        layers = [name.removesuffix(".lora_A.default.magnitudes") for name in magnitudes]
        deltas = {name: by_formula(parameters, name, blocks) for name in layers}
        expected = plain(task, deltas, rows[0].input_ids[None])
        with torch.no_grad():
            found = model.eval()(rows[0].input_ids[None]).logits
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

        version = method.finish(written(model, work / "trained"), work)
        names = load_file(version / "adapter_model.safetensors")
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(task.base), version).eval()
        for name, delta in deltas.items():
            own = again.get_submodule(name).get_delta_weight("default").double()
            torch.testing.assert_close(own, delta, rtol=1e-5, atol=1e-6)
        method.keep(version)
        served, blocks = version, [*blocks, 8]
        assert load_file(task.state)["ranks"].tolist() == blocks


def test_what_is_not_its_own_stays_as_it_is(task: Task, tmp_path: Path) -> None:
    method = SDLora(task)
    method.most = 16
    start = method.start(tmp_path / "adapters" / "math", tmp_path)
    method.prepare(model := learner(task, start))
    method.keep(start)
    for served, blocks in ((start, [4, 8]), (tmp_path / "adapters" / "code", [4])):  # the latter is another adapter
        later = SDLora(task)
        later.start(served, tmp_path / f"on-{len(blocks)}")
        assert later.blocks == blocks
    method.keep(cut := method.finish(written(model, tmp_path / "trained"), tmp_path))  # 12 ranks and 8 are over 16
    assert json.loads((cut / "adapter_config.json").read_text())["r"] == 8
    assert load_file(task.state)["ranks"].tolist() == [8]
