"""The kernels between a prompt's products against plain torch in float64, in both forms of the shrink."""

import pytest
import torch
from torch.nn import functional as F

from molora_kernels.epilogue import Added, add_norm, gate, heads
from molora_kernels.order import PagedPlan
from molora_kernels.shrink import ShrinkTile, shrink, shrink_hot
from tests.conftest import DEVICE
from tests.kernels.test_step import EPS, Group, close, norm

FORMS = ["few", "block", "block, two slots at once", "hot", "base"]


class Prompt(Group):
    """70 tokens (or 9, which take the kernels of a decode step) with the product of the base made by torch."""

    def __init__(self, form: str, outputs: tuple[int, ...], top: int = 2) -> None:
        super().__init__(9 if form == "few" else 70, 48, outputs, top)
        self.form = form
        self.y = (self.x @ self.weight.T).unsqueeze(0)

    @property
    def shrunk(self) -> Added | None:
        if self.form == "base":
            return None
        blocks = None if self.form == "few" else PagedPlan(self.slots, self.weights).blocks
        if self.form == "hot":
            h = shrink_hot(self.x, self.pages)
        else:
            tile = ShrinkTile(16, 32, at_once=2 if "two" in self.form else 1)
            h = shrink(self.x, self.pages, self.slots, blocks, tile, DEVICE.type == "cpu")
        return Added(h, self.pages, self.slots, self.weights, blocks)

    @property
    def expected(self) -> torch.Tensor:
        return self.exact(adapted=self.form != "base")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top", [1, 3])
def test_add_norm(top: int, form: str) -> None:
    group = Prompt(form, (150,), top)
    T = len(group.x)
    gain, x, residual = group.randn(150), torch.full((T, 150), torch.nan, device=DEVICE), group.randn(T, 150)
    expected = residual.double() + group.expected
    add_norm(residual, group.y, gain, x, EPS, group.shrunk)
    close(residual, expected)
    close(x, norm(expected, gain))


@pytest.mark.parametrize("form", FORMS)
def test_gate(form: str) -> None:
    group = Prompt(form, (150, 150))
    m = torch.full((len(group.x), 150), torch.nan, device=DEVICE)
    gate(group.y, m, group.shrunk)
    g, u = group.expected.split(150, 1)
    close(m, F.silu(g) * u)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "normed", "bias"])
def test_heads(kind: str, form: str) -> None:
    N, H, G, width, past = (3 if form == "few" else 2), 4, 2, 24, 5
    group = Prompt(form, (H * width, G * width, G * width))
    T = len(group.x) // N
    bias = group.randn((H + 2 * G) * width) if kind == "bias" else None
    gains = (group.randn(width), group.randn(width))
    angle = torch.outer(torch.arange(90.0), torch.logspace(0, -2, width // 2)).to(DEVICE)
    positions = torch.randint(90, (N * T,), generator=group.generator).to(DEVICE)
    q = torch.full((N, T, H, width), torch.nan, device=DEVICE)
    keys, values = torch.zeros(2, N, G, past + T + 3, width, device=DEVICE).unbind(0)
    heads(
        group.y, bias, q, keys, values, (*gains, EPS) if kind == "normed" else None, (angle.cos(), angle.sin()),
        positions, torch.full((N,), past, device=DEVICE), group.shrunk,
    )  # fmt: skip
    y = group.expected + (bias.double() if bias is not None else 0)
    expected = [part.view(N, T, -1, width) for part in y.split(group.outputs, 1)]
    for index, gain in enumerate(gains):
        part = norm(expected[index], gain) if kind == "normed" else expected[index]
        cos, sin = (f(angle[positions].double()).repeat(1, 2).view(N, T, 1, width) for f in (torch.cos, torch.sin))
        low, high = part.chunk(2, -1)
        expected[index] = part * cos + torch.cat([-high, low], -1) * sin
    here = slice(past, past + T)
    for found, wanted in zip((q.transpose(1, 2), keys[:, :, here], values[:, :, here]), expected, strict=True):
        close(found, wanted.transpose(1, 2))
    for cache in (keys, values):
        assert not cache[:, :, :past].any() and not cache[:, :, past + T :].any()
