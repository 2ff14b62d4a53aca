"""What a router's samples protect while it learns rows of new text, against the same by hand."""

import copy
import math

import pytest
import torch

from molora import Router, RouterConfig
from molora.router import NEVER
from molora_training.continual.sketches import EVERY, Sketches, found

ROWS = ["domain/math", "domain/code", "domain/none", "user/none"]


@pytest.fixture
def served() -> Router:
    """Two adapters with eight samples each, in a heap each, and the null with none."""
    torch.manual_seed(0)
    router = Router(RouterConfig(reads=(0, 1), width=4, hidden=6, units=3), ROWS, 12)
    heaps = 2 * torch.eye(6)[:2]
    for part in router.parts:
        rows = torch.arange(16) % 2
        part.samples.set(heaps[rows] + 0.5 * torch.randn(16, 6), rows)  # type: ignore[union-attr, operator]
        with torch.no_grad():
            part.output.weight[:2] = heaps  # type: ignore[union-attr, index]
    return router


def test_the_penalty_is_the_divergence_from_what_it_said(served: Router) -> None:
    router = copy.deepcopy(served)
    router.add_row("domain/law")
    with torch.no_grad():
        for part in router.parts:
            part.output.weight[4], part.output.bias[4] = torch.randn(6), 0.3  # type: ignore[union-attr, index]
    hold = Sketches(["domain/math", "domain/code"], 1, served)
    assert hold.lacking(router) == []
    hold.prepare(router)
    expected = 0.0
    for part in router.parts:
        weight, bias = part.output.weight.double(), part.output.bias.double()  # type: ignore[union-attr, operator]
        each = []
        for row in (0, 1):
            own = [n for n in range(16) if n % 2 == row]
            for place, number in enumerate(own):
                if place % EVERY == EVERY - 1:  # kept apart, to judge by
                    continue
                logits = weight.detach() @ part.samples.features[number].double() + bias.detach()  # type: ignore[union-attr, index]
                before = torch.log_softmax(logits[[0, 1, 2]], 0)
                now = torch.log_softmax(logits[[0, 1, 2, 4]], 0)[:3]
                each.append(float((before.exp() * (before - now)).sum()))
        expected += sum(each) / len(each)
    assert float(hold.penalty()) == pytest.approx(2.0 * expected, rel=1e-5) and expected > 0.1


def test_new_rows_alone_move_and_leave_the_samples_to_their_rows(served: Router) -> None:
    router = copy.deepcopy(served)
    router.add_row("domain/law")
    with torch.no_grad():
        for part in router.parts:  # at first it takes everything
            part.output.bias[4] = 50.0  # type: ignore[union-attr, index]
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    share = found(served, "domain/math")
    assert found(router, "domain/math") == 0.0
    hold = Sketches(["domain/math", "domain/code"], 1, served)
    hold.prepare(router)
    learning = [parameter for parameter in router.parameters() if parameter.requires_grad]
    assert {tuple(parameter.shape) for parameter in learning} == {(5, 6), (5,)}
    optimizer = torch.optim.AdamW(learning, 0.5, weight_decay=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        hold.penalty().backward()
        optimizer.step()
    for name, tensor in router.state_dict().items():
        kept = slice(0, 2) if ".output." in name else slice(None)  # rows 2 and 3 are no text's that is protected
        assert torch.equal(tensor[kept], before[name][kept]), name
    assert share > 0.9 and found(router, "domain/math") >= 0.75 and float(hold.penalty().detach()) < 0.05


def test_what_was_no_row_before_had_no_share(served: Router) -> None:
    hold = Sketches(["domain/math"], 1, served)
    router = copy.deepcopy(served)
    router.add_row("domain/law")  # never chosen yet
    hold.prepare(router)
    assert float(hold.penalty()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        router.parts[0].output.bias[4] = 5.0  # type: ignore[union-attr, index]
    assert math.isfinite(float(hold.penalty())) and float(hold.penalty()) > 0.1
    assert NEVER < -1e3


def test_a_row_without_samples_is_named(served: Router) -> None:
    assert Sketches(["domain/math", "domain/none"], 1, served).lacking(served) == ["domain/none"]
    samples = served.parts[1].samples
    samples.set(samples.features[samples.rows == 1], samples.rows[samples.rows == 1])  # type: ignore[union-attr, operator, index]
    assert Sketches(["domain/math"], 1, served).lacking(served) == ["domain/math"]
