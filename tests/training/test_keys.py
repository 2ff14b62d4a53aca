"""Keys to adapters: what scikit-learn's discriminant analysis says, and what comes or goes leaves the others alone."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import LlamaConfig, LlamaForCausalLM

from molora_training.continual.keys import LAST, MEAN, READS, Keys, represented
from molora_training.data import Encoded


def clouds(names: str, count: int = 40, size: int = 12) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=chance)
    return {
        n: torch.randn(count, size, generator=chance) @ mix + 2 * torch.randn(size, generator=chance) for n in names
    }


def test_the_nearest_is_what_discriminant_analysis_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora_training.continual.keys.SHRINKS", 0.0)
    known, keys = clouds("abcd"), Keys()
    for name, questions in known.items():
        keys.add(name, questions)
    rows = torch.cat(list(known.values())).numpy()
    labels = [name for name, questions in known.items() for _ in questions]
    other = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(rows, labels)
    found = keys.nearest(torch.cat(list(known.values())))
    assert found == list(other.predict(rows)) and len(set(found)) == 4


def test_the_order_does_not_matter_and_what_left_is_not_chosen() -> None:
    known = clouds("abcd")
    one, other = Keys(), Keys()
    for name in "abcd":
        one.add(name, known[name])
    for name in "dbca":
        other.add(name, known[name])
    asked = torch.cat(list(known.values()))
    assert one.nearest(asked) == other.nearest(asked)
    one.remove("b")
    found = one.nearest(asked)
    assert "b" not in found and found[:40].count("a") > 30
    assert one.bytes == 4 * (12 * 12 + 3 * 12)


def test_a_question_ends_where_the_answer_begins() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=5, **sizes)).eval()
    short, long = (torch.arange(5, 5 + length) for length in (6, 9))
    rows = []
    for ids in (short, long):
        labels = torch.where(torch.arange(len(ids)) >= 4, ids, -100)
        rows.append(Encoded(ids, labels, torch.zeros_like(ids), torch.zeros_like(ids)))
    found = represented(base, rows, 0, 64)
    torch.testing.assert_close(found[0], found[1])  # the same four tokens ask
    with torch.no_grad():
        states = base(short[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0, MEAN], states[READS][0, :4].mean(0))
    torch.testing.assert_close(found[0, LAST], states[READS][0, 3])
