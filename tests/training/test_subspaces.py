"""InfLoRA against numpy: what its new ranks read, what it knows of older tasks, and that those do not change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molora_training.continual.inflora import InfLora
from molora_training.continual.subspaces import directions, grown
from molora_training.data import collate
from tests.training.tasks import learner, make_task, rows_of, saying, trainable


def covariance_of(width: int, seed: int, decay: float) -> np.ndarray:
    """Of 200 inputs that are larger in some directions than in others."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0]
    inputs = rng.standard_normal((200, width)) * decay ** np.arange(width) @ rotation
    return inputs.T @ inputs / 200


# The second is too wide for a full decomposition; both start from a subspace that the new inputs reach into.
@pytest.mark.parametrize(("width", "decay"), [(7, 0.7), (90, 0.8)])
def test_new_ranks_read_what_is_largest_outside(width: int, decay: float) -> None:
    covariance = covariance_of(width, 1, decay)
    basis = np.linalg.svd(covariance_of(width, 2, decay))[0][:, :3]
    expected = np.linalg.svd(covariance - basis @ basis.T @ covariance)[0][:, :4]
    found = directions(torch.from_numpy(covariance), torch.from_numpy(basis), 4).numpy()
    np.testing.assert_allclose(np.abs(found @ expected), np.eye(4), atol=1e-7)  # but for their signs
    np.testing.assert_allclose(found @ basis, 0, atol=1e-10)


def test_ranks_for_which_nothing_is_left_read_nothing() -> None:
    covariance = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0]))
    found = directions(covariance, torch.eye(4)[:, :2], 3)
    expected = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).double()
    torch.testing.assert_close(found.abs(), expected)


@pytest.mark.parametrize(("width", "share", "most"), [(7, 0.9, 9), (7, 0.999, 9), (90, 0.97, 40), (90, 0.97, 4)])
def test_a_basis_grows_to_its_share(width: int, share: float, most: int) -> None:
    covariance = covariance_of(width, 1, 0.9)
    basis = np.linalg.svd(covariance_of(width, 2, 0.9))[0][:, :2]
    rest = covariance - basis @ basis.T @ covariance
    vectors, values, _ = np.linalg.svd(rest)
    held, count = 1 - (rest**2).sum() / (covariance**2).sum(), 0
    while held < share and count < most - 2:
        held += values[count] ** 2 / (covariance**2).sum()
        count += 1
    found = grown(torch.from_numpy(basis), torch.from_numpy(covariance), share, most).numpy()
    assert found.shape == (width, 2 + count) and count > 0
    np.testing.assert_array_equal(found[:, :2], basis)
    np.testing.assert_allclose(found.T @ found, np.eye(2 + count), atol=1e-9)
    expected = vectors[:, :count]
    np.testing.assert_allclose(found[:, 2:] @ found[:, 2:].T, expected @ expected.T, atol=1e-6)


@torch.no_grad()
def read_in(model: Any, rows: Any) -> dict[str, torch.Tensor]:
    """The inputs of every module with an adapter [tokens, in], float64."""
    found: dict[str, list[torch.Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    hooks = [
        layer.register_forward_hook(lambda _, x, __, name=name: found.setdefault(name, []).append(x[0][0].double()))
        for name, layer in layers.items()
    ]
    for row in rows:
        model.eval()(row.input_ids[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def test_a_task_leaves_what_older_tasks_read(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    served = tmp_path / "adapters" / "math"
    InfLora(task).keep(served)
    bases = load_file(task.state)
    old = read_in(learner(task, served), rows_of(task))
    assert len(bases) == 3 * 4 < len(old) == 3 * 7  # queries, keys and values read the same, and gates and ups
    for name, basis in bases.items():
        covariance = (old[name].T @ old[name] / len(old[name])).numpy()
        vectors, values, _ = np.linalg.svd(covariance)
        count = min(int(((values**2).cumsum() / (values**2).sum() < 0.98).sum()) + 1, len(covariance) // 2)
        np.testing.assert_allclose(basis @ basis.T, vectors[:, :count] @ vectors[:, :count].T, atol=1e-3)

    other = saying(task, "7 xyz")
    method = InfLora(other)
    wider = method.start(served, tmp_path)
    model = learner(other, wider)
    method.prepare(model)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    new = read_in(learner(other, wider), rows_of(other))
    for name, basis in bases.items():
        covariance = (new[name].T @ new[name] / len(new[name])).numpy()
        known = basis.double().numpy()
        vectors = np.linalg.svd(covariance - known @ (known.T @ covariance))[0]
        a = before[f"{name}.lora_A.default.weight"][4:].double().numpy() * 3**0.5
        np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-4)
        np.testing.assert_allclose(a @ vectors[:, :8] @ vectors[:, :8].T, a, atol=1e-3)
    batch = collate(rows_of(other), 0)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimizer.step()
    for name, p in trainable(model).items():
        if "lora_A" in name:
            assert torch.equal(p, before[name])
        else:
            assert torch.equal(p[:, :4], before[name][:, :4]) and not torch.equal(p[:, 4:], before[name][:, 4:])
    parameters = trainable(model)
    for name, basis in bases.items():  # what the new ranks add to the older task's directions
        a, b = (parameters[f"{name}.lora_{one}.default.weight"].detach() for one in "AB")
        assert float((b[:, 4:] @ a[4:] @ basis).abs().max()) < 1e-5 < float((b[:, 4:] @ a[4:]).abs().max())
    method.keep(wider)
    later = load_file(task.state)
    assert all(torch.equal(later[name][:, : basis.shape[1]], basis) for name, basis in bases.items())
