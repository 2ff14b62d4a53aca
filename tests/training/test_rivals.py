"""Rivals that choose one adapter for a whole sequence or turn, on a tiny model."""

import pytest
import torch

from molora import MoLoRAModel
from molora_training.data import IGNORED, collate
from molora_training.evaluate import LAYER, LabelRouter, losses, routed_by
from molora_training.rivals import Centroids, Classifier, Features, Rival, questions
from tests.training.test_evaluate import DOMAINS, row
from tests.unit.spoken import make_spoken


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    return make_spoken(tmp_path_factory.mktemp("spoken"))


def test_a_question_is_the_mean_of_its_tokens_without_adapters(model: MoLoRAModel) -> None:
    rows = [row(model, "math", "code"), row(model, "code")]
    found = questions(model, collate(rows, 0))
    assert found.shape[:2] == (2, 2) and not found[1, 1].any()
    for index, one in enumerate(rows):
        hidden = model.base(one.input_ids[None], output_hidden_states=True).hidden_states[-1][0]
        for pair in range(int(one.segments.max()) + 1):
            asked = (one.segments == pair) & (one.labels == IGNORED)
            assert torch.allclose(found[index, pair], hidden[asked].mean(0), atol=1e-5)


class ByNumber(Rival):
    """Chooses by the order of the features alone: 0, 1, 0 ..."""

    def choose(self, features: torch.Tensor) -> torch.Tensor:
        return torch.arange(features.shape[1]).remainder(2).expand(features.shape[:2])


def test_a_choice_holds_for_its_turn_or_for_the_whole_sequence(model: MoLoRAModel) -> None:
    batch = collate([row(model, "code", "code", "code"), row(model, "code")], 0)
    by_turn = ByNumber(model, DOMAINS, "turn").labels(batch)
    there = batch.segments >= 0
    assert torch.equal(by_turn.domain_ids[there], batch.segments[there] % 2)
    whole = ByNumber(model, DOMAINS, "sequence").labels(batch)
    assert (whole.domain_ids[there] == 0).all()
    assert (by_turn.domain_ids[~there] == -1).all() and (whole.domain_ids[~there] == -1).all()
    assert torch.equal(whole.labels, batch.labels)


@pytest.mark.parametrize("kind", [Centroids, Classifier])
def test_they_learn_what_can_be_told_apart(model: MoLoRAModel, kind: type[Rival]) -> None:
    rows = [row(model, name, other) for name in DOMAINS for other in DOMAINS for _ in range(3)]
    train = Features(model, rows)
    assert train.x.shape[0] == len(train.y) == 2 * len(rows)
    assert torch.bincount(train.y).tolist() == [len(rows), len(rows)]
    rival = kind(model, DOMAINS, "turn", train)  # type: ignore[call-arg]
    batch = collate(rows, 0)
    assert torch.equal(rival.labels(batch).domain_ids, batch.domain_ids)
    oracle = LabelRouter(model, DOMAINS)
    with torch.no_grad(), routed_by(model, oracle):
        ours = losses(model, rows, {LAYER: "auto"}, 2, lambda batch: oracle.see(rival.labels(batch)))
        label = losses(model, rows, {LAYER: "auto"}, 2, oracle.see)
    assert torch.equal(ours.loss, label.loss)
