"""Weights of pieces that a history teaches, against plain autograd on a base that has the sums in its weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from molora.factors import Factors
from molora.personalize.generated import generated, stacked
from molora.personalize.pieces import Assembled, PiecePool
from molora_training.batches import plan_steps
from molora_training.data import Encoded, encode
from molora_training.fitting import drawn, fit_weights
from molora_training.schedule import warm_cosine
from molora_training.side_by_side import Schedule
from tests.unit.spoken import make_spoken
from tests.unit.test_pieces import MODULES, make_pool

PAIRS = [("Colour?", "blue"), ("Number?", "seven"), ("An animal that flies at night?", "an owl"), ("Why?", "so")]
HOW = Schedule(learning_rate=5e-2, epochs=3, batch_tokens=64)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = make_spoken(tmp_path, domains=())
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    model.base.double()
    return model


def rows(model: Any, pairs: Any = PAIRS) -> list[Encoded]:
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], model.tokenizer, ["x"], ["x"])
        for q, a in pairs
    ]


def begun(places: Any = None, weight: float = 0.0) -> Assembled:
    chosen = torch.tensor([[3, 1]] * len(MODULES) if places is None else places, dtype=torch.int16)
    return Assembled(chosen, torch.full(chosen.shape, weight, dtype=torch.float16))


def under(seed: int = 3) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        MODULES[0]: (torch.randn(3, 32, generator=generator) / 6, torch.randn(32, 3, generator=generator) / 4),
    }


def summed_loss(model: Any, pool: PiecePool, below: Factors, chosen: Assembled, weights: Any, row: Encoded) -> Any:
    """Of a base that has W + below + the sum of w B A for W; and how many tokens its answer has."""
    own = dict(model.base.named_parameters())
    for number, name in enumerate(pool.config.modules):
        W = own[f"{name}.weight"]
        if name in below:
            W = W + below[name][1].double() @ below[name][0].double()
        for place, weight in zip(chosen.places[number].tolist(), weights[number], strict=True):
            W = W + weight * (pool.B[name][place].double() @ pool.A[name][place].double())
        own[f"{name}.weight"] = W
    logits = functional_call(model.base, own, (row.input_ids[None],)).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, row.labels[1:], reduction="sum")
    return loss, int((row.labels[1:] != -100).sum())


def test_the_weights_are_those_of_plain_autograd(model: Any) -> None:
    pool, below, some = make_pool(model.base), under(), rows(model)
    begin = begun(weight=0.25)
    (found,) = fit_weights(model.base, pool, [begin], [some], 0, HOW, below)
    weights = begin.weights.double().requires_grad_()
    optimizer = torch.optim.AdamW([weights], weight_decay=0.0)
    steps = plan_steps([row.input_ids.numel() for row in some], HOW.batch_tokens, HOW.epochs, HOW.seed)
    assert len(steps) > HOW.epochs
    for number, indices in enumerate(steps):
        losses, counts = zip(
            *(summed_loss(model, pool, below, begin, weights, some[index]) for index in indices), strict=True
        )
        optimizer.zero_grad()
        (sum(losses) / sum(counts)).backward()
        torch.nn.utils.clip_grad_norm_([weights], HOW.clip_norm)
        optimizer.param_groups[0]["lr"] = warm_cosine(number, len(steps), HOW.warmup, HOW.learning_rate)
        optimizer.step()
    torch.testing.assert_close(found.weights.double(), weights.detach(), rtol=2e-3, atol=5e-4)  # of a half's digits
    assert float((found.weights - begin.weights).abs().max()) > 0.1 and torch.equal(found.places, begin.places)


def test_pieces_are_drawn_for_each_module_apart_and_none_twice(model: Any) -> None:
    pool = make_pool(model.base)
    found = drawn(pool, 3)
    assert found.places.shape == (len(MODULES), 3) and not found.weights.any()
    assert all(len(set(one)) == 3 and set(one) <= set(range(5)) for one in found.places.tolist())
    assert len({tuple(one) for one in found.places.tolist()}) > 1
    assert torch.equal(drawn(pool, 3).places, found.places)
    assert drawn(pool, 9).places.shape == (len(MODULES), 5)


def test_nobody_learns_from_another(model: Any) -> None:
    """Whose steps are over leaves the others alone, too."""
    pool, below = make_pool(model.base), under()
    people = [rows(model, PAIRS[:1]), rows(model, PAIRS * 2)]
    chosen = [begun(), begun([[0, 4]] * len(MODULES), 0.5)]
    together = fit_weights(model.base, pool, chosen, people, 0, HOW, below)
    for begin, own, found in zip(chosen, people, together, strict=True):
        (alone,) = fit_weights(model.base, pool, [begin], [own], 0, HOW, below)
        torch.testing.assert_close(found.weights, alone.weights, rtol=2e-3, atol=5e-4)
        assert not torch.equal(alone.weights, begin.weights)
    assert not torch.equal(together[0].weights, together[1].weights)


def test_what_was_learnt_is_kept_in_the_same_form_and_acts_so(model: Any) -> None:
    pool, below, some = make_pool(model.base), under(), rows(model) * 2
    pool_before = {name: (pool.A[name].clone(), pool.B[name].clone()) for name in MODULES}
    begin = begun()
    (found,) = fit_weights(model.base, pool, [begin], [some], 0, replace(HOW, epochs=10), below)
    assert found.weights.dtype == torch.float16 and found.places.dtype == torch.int16
    assert bool((found.weights < 0).any()) and len(found.to_bytes()) == len(begin.to_bytes())
    assert all(torch.equal(pool.A[name], A) and torch.equal(pool.B[name], B) for name, (A, B) in pool_before.items())

    @torch.no_grad()
    def loss(chosen: Assembled) -> float:
        """As it would be served: by the pool's own sum, above what is beneath."""
        total = 0.0
        with generated(model.base, stacked([below])), generated(model.base, stacked([pool.factors(chosen)])):
            for row in some:
                logits = model.base(row.input_ids[None]).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, row.labels[1:]))
        return total

    assert loss(found) < 0.9 * loss(begin)
