"""Shapes that nobody chose, against float64: a few in the interpreter, 200 on a GPU."""

import random

import pytest
import torch

from molora_kernels import Factors
from molora_kernels.paged import add_lora_paged
from molora_kernels.pages import RankPages
from tests.conftest import DEVICE

ON_GPU = DEVICE.type == "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # relative, of the norm


@pytest.mark.parametrize("seed", range(200 if ON_GPU else 12))
def test_a_random_shape(seed: int) -> None:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw.choice(list(TOLERANCE))
    K, S = draw.randint(1, 40 if ON_GPU else 5), draw.randint(1, 4)
    T = draw.randint(1, 1500 if ON_GPU else 30)
    D = draw.randint(1, 3000 if ON_GPU else 150)
    outputs = tuple(draw.randint(1, 2000 if ON_GPU else 90) for _ in range(draw.randint(1, 3)))
    ranks = [draw.randint(1, draw.choice([4, 16, 256 if ON_GPU else 40])) for _ in range(K)]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    pages = RankPages(D, outputs, K, sum(-(-rank // 16) for rank in ranks), max(ranks), dtype, DEVICE)
    factors = [[Factors(randn(r, D) / D**0.5, randn(r, wide) / r**0.5) for wide in outputs] for r in ranks]
    for slot, parts in enumerate(factors):
        pages.put(slot, parts)
    slots = torch.randint(-1, K, (T, S), generator=generator).to(DEVICE)  # a slot may come twice in a row
    weights = torch.rand(T, S, generator=generator).to(DEVICE) + 0.5
    x, y = randn(T, D), randn(T, sum(outputs))
    expected = y.double()
    for slot, parts in enumerate(factors):
        weight = (weights.double() * (slots == slot)).sum(1, keepdim=True)
        delta = torch.cat([x.double() @ A.double().T @ B.double() for A, B in parts], 1)
        expected = expected + weight * delta
    found = add_lora_paged(y, x, pages, slots, weights, by_token=draw.choice([True, False]))
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
