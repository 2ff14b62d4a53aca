"""An adapter that is put together from others' pieces: what is chosen, the sum, what is stored."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from molora.chat import render
from molora.errors import DataError, HypernetError
from molora.factors import write_factors
from molora.personalize.pieces import Assembled, PiecePool, PoolConfig, mean_inputs
from tests.unit.spoken import make_spoken

MODULES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj"))
HISTORY = [
    [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "blue"}],
    [{"role": "user", "content": "And the sea, which one is it?"}, {"role": "assistant", "content": "green, mostly"}],
]


def make_pool(base: Any, sharers: int = 5, seed: int = 0) -> PiecePool:
    generator = torch.Generator().manual_seed(seed)
    A, B, gates = {}, {}, {}
    for name in MODULES:
        module = base.get_submodule(name)
        linear = getattr(module, "base_layer", module)
        A[name] = torch.randn(sharers, 2, linear.in_features, generator=generator) / 6
        B[name] = torch.randn(sharers, linear.out_features, 2, generator=generator) / 2
        gates[name] = torch.randn(sharers, linear.in_features, generator=generator)
    return PiecePool(PoolConfig("tiny", MODULES, sharers, 2), A, B, gates)


def test_the_mean_input_is_that_of_answer_tokens(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    found = mean_inputs(model.base, model.tokenizer, HISTORY, MODULES)
    seen = []
    for messages in HISTORY:
        prompt = render(model.tokenizer, messages[:1], add_generation_prompt=True)
        whole = prompt + messages[1]["content"] + "<|im_end|>"
        ids = model.tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
        first = len(model.tokenizer(prompt, add_special_tokens=False)["input_ids"]) - 1
        with torch.no_grad():
            states = model.base(ids, output_hidden_states=True).hidden_states[1]
            x = model.base.model.layers[1].input_layernorm(states)[0, first:-1].double()
        seen.append((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
    wanted = torch.cat(seen).mean(0)
    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj"].double(), wanted, rtol=1e-4, atol=1e-5)


def test_pieces_are_chosen_by_their_gates(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    pool = make_pool(model.base)
    found = pool.assemble(model.base, model.tokenizer, HISTORY, top=2)
    inputs = mean_inputs(model.base, model.tokenizer, HISTORY, MODULES)
    for row, name in enumerate(MODULES):
        scores = []
        for gate in pool.gates[name].double():
            normed = (gate - gate.mean()) / (gate.var(unbiased=False) + 1e-5).sqrt()
            scores.append(float(normed @ inputs[name].double()) / len(gate) ** 0.5)
        best = sorted(range(5), key=lambda sharer: -scores[sharer])[:2]
        assert found.places[row].tolist() == best
        wanted = torch.tensor([scores[sharer] for sharer in best]).softmax(0)
        torch.testing.assert_close(found.weights[row].float(), wanted, rtol=2e-3, atol=1e-3)
    assert pool.assemble(model.base, model.tokenizer, HISTORY, top=9).places.shape == (6, 5)


def test_the_sum_is_of_products(tmp_path: Path) -> None:
    pool = make_pool(make_spoken(tmp_path).base)
    weights = torch.tensor([[0.5, 0.25]] * 6, dtype=torch.float16)
    chosen = Assembled(torch.tensor([[3, 1]] * 6, dtype=torch.int16), weights)
    for name, (A, B) in pool.factors(chosen).items():
        wanted = 0.5 * pool.B[name][3] @ pool.A[name][3] + 0.25 * pool.B[name][1] @ pool.A[name][1]
        torch.testing.assert_close(B @ A, wanted)


@torch.no_grad()
def test_one_sharers_pieces_are_the_sharers_adapter(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "m")
    pool = make_pool(model.base, sharers=1)
    chosen = pool.assemble(model.base, model.tokenizer, HISTORY)
    write_factors(tmp_path / "whole", pool.factors(chosen), "tiny")
    write_factors(tmp_path / "own", {name: (pool.A[name][0], pool.B[name][0]) for name in MODULES}, "tiny")
    ids = torch.arange(5, 40).view(1, -1)
    plain = copy.deepcopy(make_spoken(tmp_path / "n", domains=()).base)
    found, wanted = (
        PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / one)(ids).logits for one in ("whole", "own")
    )
    assert torch.equal(found, wanted) and not torch.equal(wanted, plain(ids).logits)


def test_what_a_user_keeps_is_small_and_comes_back(tmp_path: Path) -> None:
    of_starter = Assembled(torch.randint(50, (120, 3), dtype=torch.int16), torch.rand(120, 3).half())
    assert len(of_starter.to_bytes()) <= 2048
    (tmp_path / "ada.safetensors").write_bytes(of_starter.to_bytes())
    again = Assembled.load(tmp_path / "ada.safetensors")
    assert torch.equal(again.places, of_starter.places) and torch.equal(again.weights, of_starter.weights)
    pool = make_pool(make_spoken(tmp_path / "m").base)
    pool.save(tmp_path / "pool")
    loaded = PiecePool.load(tmp_path / "pool")
    assert loaded.config == pool.config
    assert torch.equal(loaded.A[MODULES[0]], pool.A[MODULES[0]].bfloat16().float())


def test_what_stops_with_a_sentence(tmp_path: Path) -> None:
    model = make_spoken(tmp_path / "m")
    pool = make_pool(model.base)
    with pytest.raises(DataError, match="no answer"):
        pool.assemble(model.base, model.tokenizer, [[{"role": "user", "content": "Hello?"}]])
    chosen = pool.assemble(model.base, model.tokenizer, HISTORY)
    for wrong in (
        replace(chosen, places=chosen.places + 5),
        replace(chosen, places=chosen.places - 5),
        replace(chosen, weights=chosen.weights[:, :1]),
        replace(chosen, weights=chosen.weights[:-1]),
        Assembled(chosen.places[:-1], chosen.weights[:-1]),
        Assembled(chosen.places[:, :0], chosen.weights[:, :0]),
        Assembled(chosen.places[:, 0], chosen.weights[:, 0]),
    ):
        with pytest.raises(DataError, match="another pool"):
            pool.factors(wrong)
    pool.A[MODULES[0]] = pool.A[MODULES[0]][..., :-1]
    with pytest.raises(HypernetError, match="maps 31 to 32 features; this base has 32 to 32"):
        pool.check(model.base)
    with pytest.raises(HypernetError, match="There is no pool of pieces at"):
        PiecePool.load(tmp_path / "none")
    make_pool(model.base).save(tmp_path / "pool")
    about = json.loads((tmp_path / "pool/pool.json").read_text())
    (tmp_path / "pool/pool.json").write_text(json.dumps({**about, "modules": ["x"]}))
    with pytest.raises(HypernetError, match="is damaged"):
        PiecePool.load(tmp_path / "pool")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(DataError, match="no assembled adapter"):
        Assembled.load(tmp_path / "bad")


def test_the_nearest_sharers_are_merged_with_their_own_weights(tmp_path: Path) -> None:
    pool = make_pool(make_spoken(tmp_path / "m").base)
    mine = torch.tensor([1.0, 0.0])
    with pytest.raises(HypernetError, match="embedded by nothing"):
        pool.nearest(mine)
    angles = torch.tensor([1.5, 0.2, 0.9, 3.0, 0.6])
    pool.embeddings = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[3.0]])
    found = pool.nearest(mine)
    assert found.places.tolist() == [[1, 4]] * len(MODULES)  # the nearest first, and the larger weight its own
    cosines = angles[[1, 4]].cos()
    torch.testing.assert_close(found.weights[0].float(), cosines / cosines.sum(), rtol=1e-3, atol=1e-3)
    first, second = found.weights[0].float().tolist()
    for name, (A, B) in pool.factors(found).items():
        wanted = first * pool.B[name][1] @ pool.A[name][1] + second * pool.B[name][4] @ pool.A[name][4]
        torch.testing.assert_close(B @ A, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(HypernetError, match="in 3 numbers"):
        pool.nearest(torch.ones(3))
    pool.save(tmp_path / "pool")
    again = PiecePool.load(tmp_path / "pool").embeddings
    assert again is not None and torch.equal(again, pool.embeddings)
