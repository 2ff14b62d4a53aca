"""Learning without backpropagation: the slopes are those of autograd, and what is done with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molora.errors import NonFiniteError
from molora_training.federated import forward_only
from molora_training.federated.changes import b_vector
from molora_training.federated.client import Client
from molora_training.federated.forward_only import alike, direction, gradient
from molora_training.federated.lora import Lora, read_bytes
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import LocalSettings
from tests.federated.parties import make_settings

SIZE = 30
MATRIX = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()
WANTED = torch.randn(SIZE, generator=torch.Generator().manual_seed(2)).double()


def bowl(at: torch.Tensor) -> float:
    """A quadratic: its central differences are its slopes, whatever h is."""
    return float((MATRIX @ (at.double() - WANTED)).square().sum())


def slope_of(at: torch.Tensor) -> torch.Tensor:
    return 2 * MATRIX.T @ MATRIX @ (at.double() - WANTED)


def test_the_estimate_is_the_mean_of_slopes_along_its_directions() -> None:
    theta = torch.zeros(SIZE, dtype=torch.float64)
    found = gradient(bowl, theta, None, seed=3, agreed=float("inf"))
    assert found.directions == 4
    true = slope_of(theta)
    seeds = range(3 * forward_only.MOST * 10, 3 * forward_only.MOST * 10 + 4)
    expected = sum((true @ (v := direction(seed, SIZE).double())) * v for seed in seeds) / 4
    assert torch.allclose(found.gradient, expected, rtol=1e-6)


def test_on_average_it_is_the_gradient() -> None:
    theta = torch.zeros(SIZE, dtype=torch.float64)
    true = slope_of(theta)
    estimates = torch.stack([gradient(bowl, theta, None, seed, float("inf")).gradient for seed in range(400)])
    # E[(v^T g) v] = g; its variance along any axis is below 2 |g|^2 / 4 directions.
    off = (estimates.mean(0) - true).norm() / true.norm()
    assert float(off) < 1.5 * ((SIZE + 1) / (4 * 400)) ** 0.5


def test_directions_are_chosen_that_are_like_the_gradient_before() -> None:
    before = torch.randn(SIZE, generator=torch.Generator().manual_seed(5))
    cosine = torch.nn.functional.cosine_similarity
    chosen = alike(range(40), SIZE, before, 4)
    every = sorted((float(cosine(direction(seed, SIZE), before, 0)) for seed in range(40)), reverse=True)
    assert [float(cosine(direction(seed, SIZE), before, 0)) for seed in chosen] == pytest.approx(every[:4])
    assert alike(range(40), SIZE, None, 4) == [0, 1, 2, 3]


def test_directions_are_added_until_the_halves_agree() -> None:
    theta = torch.zeros(SIZE, dtype=torch.float64)
    assert gradient(bowl, theta, None, 0, agreed=0.0).directions == forward_only.MOST
    assert gradient(bowl, theta, None, 0, agreed=float("inf")).directions == forward_only.FEWEST
    one = torch.zeros(1, dtype=torch.float64)  # in one dimension the halves agree at once, or nearly so
    found = gradient(lambda at: float((at - 3.0).square().sum()), one, None, 0)
    assert found.directions < forward_only.MOST and found.spread <= forward_only.AGREED


def test_a_loss_that_is_not_finite_ends_it() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        gradient(lambda _: float("nan"), torch.zeros(3), None, 0)


@pytest.mark.parametrize("frozen_a", [False, True])
def test_the_order_of_entries_is_kept(frozen_a: bool) -> None:
    one = Lora({"q": (torch.randn(2, 3), torch.randn(4, 2)), "v": (torch.randn(2, 5), torch.randn(6, 2))}, 2.0)
    theta = forward_only._flat(one, frozen_a)
    assert len(theta) == (8 + 12 if frozen_a else 6 + 8 + 10 + 12)
    back = forward_only._unflat(theta, one, frozen_a)
    assert all(torch.equal(x, y) for n in one.pairs for x, y in zip(one.pairs[n], back.pairs[n], strict=True))


def test_clients_look_along_directions_of_their_own(folder: Path, tmp_path: Path, clients: dict[str, Client]) -> None:
    """Two with the same text: what they change has no more in common than the gradient does."""
    how = LocalSettings(method="forward", examples=100, learning_rate=1e-3, batch_tokens=4096, max_length=64)
    own = Federation.open(make_settings(folder, tmp_path / "out", local=how))
    one, other = (Client(name, clients["ada"].base, clients["ada"].rows) for name in ("one", "other"))
    steps = []
    for client in (one, other, one):
        before = Lora.from_tensors(*read_bytes((order := own.order(client.name, 2)).factors)[::2])
        steps.append(b_vector(before, client.train(order).lora, 2))
    alike = [float(torch.cosine_similarity(steps[0], step, 0)) for step in steps[1:]]
    assert abs(alike[0]) < 0.5 and alike[1] == pytest.approx(1, abs=1e-3)


CHILD = """
import json, os, sys, torch, transformers
from molora_training.data import Encoded
from molora_training.federated import forward_only, local
from molora_training.federated.lora import Lora
from molora_training.federated.settings import LocalSettings
from molora_training.federated.usage import measured
from molora.checks import linear_sizes
torch.set_num_threads(1)
torch.manual_seed(0)
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=24, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0)).requires_grad_(False).eval()
pairs = {n: (torch.randn(4, i) / 8, torch.zeros(o, 4)) for n, (i, o) in linear_sizes(base).items() if n != "lm_head"}
ids = torch.randint(3, 97, (int(sys.argv[1]),))
rows = [Encoded(ids, ids, ids * 0, ids * 0)] * 8
how = LocalSettings(learning_rate=1e-3, batch_tokens=8 * len(ids), max_length=len(ids), examples=8)
forward_only.MOST = 4  # directions more take time, and no memory
for way in (forward_only, local):
    if os.fork():
        os.wait()
        continue
    with measured() as before:
        pass
    with measured() as usage:
        after = way.train(base, 0, Lora(pairs, 2.0), rows, how, 0)
    moved = any(bool((b != 0).any()) for _, b in after.pairs.values())
    print(json.dumps({"peak": usage.peak_bytes - before.peak_bytes, "moved": moved}), flush=True)
    os._exit(0)
"""


def test_its_peak_memory_is_a_quarter_of_backpropagations() -> None:
    """What comes on top of the process and its base, in a process each, which one has made ready for both."""
    done = subprocess.run([sys.executable, "-c", CHILD, "512"], capture_output=True, text=True, check=True)
    forward, backprop = map(json.loads, done.stdout.splitlines()[-2:])
    assert forward["moved"] and backprop["moved"]
    assert forward["peak"] <= backprop["peak"] / 4, (forward, backprop)
