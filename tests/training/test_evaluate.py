"""The figures of the results page, on a tiny model: each contender against what it must equal."""

import pytest
import torch

from molora import MoLoRAModel
from molora_training.data import Encoded, collate, encode
from molora_training.evaluate import (
    LAYER,
    Deciding,
    Holding,
    LabelRouter,
    bootstrap,
    held,
    losses,
    right_by_position,
    routed_by,
)
from molora_training.personas import Persona, best_answer, read_personas
from tests.unit.spoken import make_spoken

DOMAINS = ["math", "code"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    return make_spoken(tmp_path_factory.mktemp("spoken"))


def row(model: MoLoRAModel, *domains: str) -> Encoded:
    turns = [
        {"role": role, "content": f"{domain} {role} {number}"}
        for number, domain in enumerate(domains)
        for role in ("user", "assistant")
    ]
    return encode(turns, model.tokenizer, domains, DOMAINS)


@torch.no_grad()
def test_the_label_oracle_is_each_domains_own_adapter(model: MoLoRAModel) -> None:
    rows = [row(model, "math"), row(model, "code", "code")]
    oracle = LabelRouter(model, DOMAINS)
    with routed_by(model, oracle):
        found = losses(model, rows, {LAYER: "auto"}, 2, oracle.see)
    own = [losses(model, [one], {LAYER: name}, 2) for one, name in zip(rows, DOMAINS, strict=True)]
    assert torch.allclose(found.loss, torch.cat([one.loss for one in own]), rtol=1e-5)
    assert found.tokens.tolist() == torch.cat([one.tokens for one in own]).tolist()


@torch.no_grad()
def test_losses_are_the_models_own(model: MoLoRAModel) -> None:
    one = row(model, "math", "code")
    expected = model(one.input_ids[None], labels=one.labels[None], selection={LAYER: "auto"}).loss
    found = losses(model, [one, row(model, "code")], {LAYER: "auto"}, 2)
    assert abs(float(found.loss[0].sum() / found.tokens[0].sum()) - float(expected)) < 1e-5
    assert int(found.tokens.sum()) == sum(int((r.labels[1:] != -100).sum()) for r in (one, row(model, "code")))


@torch.no_grad()
def test_logits_are_made_where_answers_are_alone(model: MoLoRAModel) -> None:
    rows, made = [row(model, "math", "code"), row(model, "code")], []
    hook = model.base.lm_head.register_forward_hook(lambda *seen: made.append(seen[2].shape[:-1]))
    found = losses(model, rows, {LAYER: "auto"}, 2)
    hook.remove()
    assert made == [(int(found.tokens.sum()),)]
    assert not model.base.lm_head._forward_pre_hooks


@torch.no_grad()
def test_the_uniform_merge_is_the_mean_of_the_deltas(model: MoLoRAModel) -> None:
    merge = LabelRouter(model, DOMAINS, share=True)
    one = row(model, "math", "code")
    with routed_by(model, merge, top_k=2):
        losses(model, [one], {LAYER: "auto"}, 2, merge.see)
        merge.see(type("B", (), {"domain_ids": one.domain_ids[None]})())  # type: ignore[arg-type]
        routes = model(one.input_ids[None], selection={LAYER: "auto"}, output_routes=True, use_cache=False).routes
    assert (routes.slots[..., :2].sort(-1).values == torch.tensor([0, 1])).all()
    assert torch.allclose(routes.weights[..., :2], torch.tensor(0.5))
    assert model.stack[LAYER].top_k == 1


@torch.no_grad()
def test_positions_count_every_token_once(model: MoLoRAModel) -> None:
    rows = [row(model, "math", "code"), row(model, "code")]
    oracle = LabelRouter(model, DOMAINS)

    def see(batch: object) -> None:
        oracle.see(batch)  # type: ignore[arg-type]

    with routed_by(model, oracle):
        # The oracle has to see each batch: one batch holds both rows.
        from molora_training.evaluate import batches

        for _, batch in batches(model, rows, 8192):
            see(batch)
        assert set(right_by_position(model, rows, DOMAINS).values()) == {1.0}


def test_an_interval_holds_the_mean() -> None:
    values = torch.arange(100.0)
    low, high = bootstrap(lambda index: values[index].mean(-1), 100)
    assert low < 49.5 < high and high - low < 15


def test_the_best_answer_shows_the_manner_and_ended() -> None:
    persona = Persona(None, (), (r"\barr\b", r"\bmatey\b"))
    good = "arr, matey, the sun be a star that warms the whole world<|im_end|>"
    dull = "The sun is a star that warms the whole world every day<|im_end|>"
    again = "arr matey arr matey arr matey arr matey arr matey arr matey<|im_end|>"
    cut = "arr, matey, this answer never comes to its end because it"
    assert best_answer(persona, [dull, again, cut, good]) == good.removesuffix("<|im_end|>")
    assert best_answer(persona, [dull, again, cut]) is None


def test_the_shipped_personas_show_their_own_marks() -> None:
    for name, persona in read_personas().items():
        assert all(persona.shows_in(answer) for _, answer in persona.exchanges), name


def test_a_held_route_leaves_only_for_a_clearly_better_one() -> None:
    logits = torch.tensor([[[2.0, 0, 0], [0, 0.5, 0], [0, 1.5, 0], [0, 1.2, 1.4], [0, 0, 3.0]]])
    assert held(logits, 0).tolist() == [[0, 1, 1, 2, 2]]
    assert held(logits, 1).tolist() == [[0, 0, 1, 1, 2]]
    assert held(logits, 9).tolist() == [[0, 0, 0, 0, 0]]


@torch.no_grad()
def test_holding_by_nothing_is_the_router_and_by_much_stays(model: MoLoRAModel) -> None:
    rows = [row(model, "math", "code"), row(model, "code", "math", "math")]
    layers = [[model.router.rows.index(name) for name in layer.rows] for layer in model.routing.layers if layer.rows]
    expected = losses(model, rows, {LAYER: "auto"}, 2)
    before = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    with routed_by(model, Holding(model.router, layers, 0.0)):
        assert torch.allclose(losses(model, rows, {LAYER: "auto"}, 2).loss, expected.loss, rtol=1e-5)
    with routed_by(model, Holding(model.router, layers, 1e3)):
        routes = model(rows[1].input_ids[None], selection={LAYER: "auto"}, output_routes=True, use_cache=False).routes
        first = routes.slots[0, 0, 0]
        assert (routes.slots[0, :, 0] == first).all()
    assert all(torch.equal(model.router.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_deciding_once_an_answer_is_the_routers_choice_where_the_question_ends(model: MoLoRAModel) -> None:
    batch = collate([row(model, "math", "code"), row(model, "code", "math", "math")], 0)
    router = Deciding(model.router)
    router.see(batch)
    asked = {"selection": {LAYER: "auto"}, "output_routes": True, "use_cache": False}
    free = model(batch.input_ids, batch.attention_mask, **asked).routes.slots[..., 0]
    with routed_by(model, router):
        slots = model(batch.input_ids, batch.attention_mask, **asked).routes.slots[..., 0]
    answers = batch.labels != -100
    wanted = free.clone()
    for n, t in answers.nonzero().tolist():
        wanted[n, t] = wanted[n, t - 1]
    real = batch.attention_mask.bool()
    assert torch.equal(slots[real], wanted[real]) and not torch.equal(free[real], wanted[real])


@torch.no_grad()
def test_short_answers_are_counted_that_greedy_decoding_writes(
    model: MoLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that the model itself wrote are exact; with one token changed they are not, and long ones not asked."""
    turns = [{"role": "user", "content": "math 1"}]
    prompt = model.encode(turns)
    made = model.generate(**prompt, selection={LAYER: "math"}, max_new_tokens=6, do_sample=False)
    own = Encoded(
        made[0],
        torch.where(torch.arange(made.shape[1]) < prompt["input_ids"].shape[1], -100, made[0]),
        torch.zeros(made.shape[1], dtype=torch.int64),
        torch.zeros(made.shape[1], dtype=torch.int64),
    )
    labels = own.labels.clone()
    labels[-1] = (labels[-1] + 1) % 261
    other = Encoded(own.input_ids, labels, own.segments, own.domain_ids)
    found = losses(model, [own, other], {LAYER: "math"}, 2)
    assert found.asked.tolist() == [[1, 0], [1, 0]] and found.exact.tolist() == [[1, 0], [0, 0]]
    assert found.accuracy == 0.5
    monkeypatch.setattr("molora_training.evaluate.SHORT", 5)
    assert losses(model, [own], {LAYER: "math"}, 2).asked.sum() == 0
