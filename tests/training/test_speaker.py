"""What is said and how likely it is, in batches: as each alone, and as plain cross-entropy has it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.factors import Factors
from molora.personalize.generated import generated, stacked
from molora_training.data import Encoded, encode
from molora_training.speaker import Speaker
from tests.unit.spoken import make_spoken

NAMES = ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return make_spoken(tmp_path, domains=())


def adapters(model: Any) -> list[Factors]:
    """Of different ranks and modules."""
    chance = torch.Generator().manual_seed(0)
    found = []
    for rank, names in ((2, NAMES), (5, NAMES[:1]), (1, NAMES[1:])):
        sizes = [model.base.get_submodule(name).weight.shape for name in names]
        found.append(
            {
                name: (torch.randn(rank, inside, generator=chance), torch.randn(outside, rank, generator=chance))
                for name, (outside, inside) in zip(names, sizes, strict=True)
            }
        )
    return found


def rows(model: Any) -> list[Encoded]:
    pairs = [("a", "b"), ("What is the longest of them all?", "this"), ("Colour?", "a very light blue")]
    return [
        encode([{"role": "user", "content": q}, {"role": "assistant", "content": a}], model.tokenizer, ["x"], ["x"])
        for q, a in pairs
    ]


@torch.no_grad()
@pytest.mark.parametrize("own", [1, 2, 0], ids=["adapters", "each twice", "base"])
def test_losses_are_cross_entropies(model: Any, own: int) -> None:
    some, made = rows(model) * max(1, own), adapters(model) * own or None
    found = Speaker(model.base, model.tokenizer, batch=2).losses(some, made)
    for place, row in enumerate(some):
        with generated(model.base, stacked([made[place]]) if made else {}):
            logits = model.base(row.input_ids[None]).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits, row.labels[1:], reduction="sum")
        assert found[place].tolist() == pytest.approx([float(wanted), int((row.labels[1:] >= 0).sum())], rel=1e-5)


@torch.no_grad()
def test_a_batch_of_answers_is_each_alone(model: Any) -> None:
    model.base.get_output_embeddings().weight.mul_(20)  # or padding that is read would change no likeliest token
    speaker, made = Speaker(model.base, model.tokenizer, batch=3, new_tokens=8), adapters(model)
    prompts = ["a", "a longer question?", "what"]
    together = speaker.answers(prompts, made)
    assert together == [speaker.answers([prompt], [one])[0] for prompt, one in zip(prompts, made, strict=True)]
    assert together != speaker.answers(prompts) and speaker.answers([]) == []


def test_adapters_that_lack_modules_move_to_another_device(model: Any) -> None:
    """A device without memory stands for a GPU: what is there cannot be put together with what is not."""
    made = adapters(model)
    found = stacked(made, "meta")
    assert {name: (A.shape[:2], B.shape[::2], A.device.type) for name, (A, B) in found.items()} == {
        NAMES[0]: ((3, 5), (3, 5), "meta"), NAMES[1]: ((3, 2), (3, 2), "meta")
    }  # fmt: skip
    for name, (A, B) in stacked(made).items():
        for place, one in enumerate(made):
            own_A, own_B = one.get(name, (A.new_zeros(0, A.shape[2]), B.new_zeros(B.shape[1], 0)))
            assert torch.equal(A[place, : len(own_A)], own_A) and not A[place, len(own_A) :].any()
            assert torch.equal(B[place, :, : len(own_A)], own_B) and not B[place, :, len(own_A) :].any()
