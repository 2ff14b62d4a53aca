"""A decode step's kernels against plain torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from molora_kernels import Factors, epilogue_token, rows
from molora_kernels.attention import Attention, AttentionTile
from molora_kernels.blocks import make_blocks
from molora_kernels.epilogue import Added, Scale, add_norm, gate, heads
from molora_kernels.linear import LinearTile, linear, shrink_block
from molora_kernels.pages import RankPages
from tests.conftest import DEVICE

EPS = 1e-6


class Group:
    """A group of modules over T tokens with adapters of ranks 3, 16 and 20; the last does not adapt the last slice."""

    def __init__(self, T: int, D: int, outputs: tuple[int, ...], top: int = 2, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.outputs = outputs
        self.x, self.weight = self.randn(T, D), self.randn(sum(outputs), D) / D**0.5
        self.pages = RankPages(D, outputs, 4, 8, 32, torch.float32, DEVICE)
        self.parts: dict[int, list[Factors | None]] = {}
        for slot, rank in enumerate((3, 16, 20)):
            pairs: list[Factors | None] = [Factors(self.randn(rank, D) / D**0.5, self.randn(rank, o)) for o in outputs]
            if slot == 2 and len(outputs) > 1:
                pairs[-1] = None
            self.parts[slot] = pairs
            self.pages.put(slot, pairs)
        self.slots = torch.randint(-1, 4, (T, top), generator=self.generator, dtype=torch.int32).to(DEVICE)
        self.weights = self.randn(T, top)
        columns = len(outputs) * self.pages.max_pages * 16
        self.h = torch.full((-(-D // shrink_block(T, D)), T, top, columns), torch.nan, device=DEVICE)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def product(self, tile: LinearTile, adapted: bool = True, by_slot: bool = False) -> torch.Tensor:
        """Partial sums of the base's product, h beside them; what is not written stays NaN."""
        y = torch.full((tile.split, len(self.x), sum(self.outputs)), torch.nan, device=DEVICE)
        blocks = make_blocks(self.slots, None, most=4) if by_slot else None
        more: tuple[Any, ...] = (self.h, self.pages, self.slots, False, blocks) if adapted else ()
        linear(y, self.x, self.weight, tile, *more)
        return y

    @property
    def added(self) -> Added:
        return Added(self.h, self.pages, self.slots, self.weights)

    def exact(self, adapted: bool = True) -> torch.Tensor:
        y, x = self.x.double() @ self.weight.double().T, self.x.double()
        for slot, pairs in self.parts.items() if adapted else ():
            weight = (self.weights.double() * (self.slots == slot)).sum(1, keepdim=True)
            column = 0
            for pair, wide in zip(pairs, self.outputs, strict=True):
                if pair is not None:
                    y[:, column : column + wide] += weight * (x @ pair.A.double().T @ pair.B.double())
                column += wide
        return y


def random_scale(group: Group) -> tuple[Scale, torch.Tensor]:
    """A norm's scale as a kernel before left it, and what it is: [T, 1]."""
    T = len(group.x)
    squares = torch.rand(T, 5, generator=group.generator).to(DEVICE)
    return Scale(squares, 40, EPS), (squares.double().sum(1, keepdim=True) / 40 + EPS).rsqrt()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain.double()


TILES = {"one part": LinearTile(16, 32), "split": LinearTile(32, 16, split=3), "ragged": LinearTile(64, 64, split=2)}


@pytest.mark.parametrize("shrink", ["by token", "by slot", "none"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("T", "D"), [(1, 96), (5, 96), (70, 96), (1, 2100), (3, 2100)])
def test_product_and_shrink_in_one_launch(T: int, D: int, tile: str, shrink: str) -> None:
    group = Group(T, D, (40,))
    y = group.product(TILES[tile], shrink != "none", shrink == "by slot")
    close(y.sum(0), group.exact(adapted=False))
    if shrink != "none":
        gain, x, residual = group.randn(40), torch.empty(T, 40, device=DEVICE), group.randn(T, 40)
        expected = residual.double() + group.exact()
        add_norm(residual, y, gain, x, EPS, group.added)
        close(residual, expected)
        close(x, norm(expected, gain))


@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("held", [1, 512, 4096])  # bytes: one page of each slot at once, two, and all of them
def test_more_than_is_read_early(held: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "HELD", held)
    group = Group(5, 64, (150, 150), top=top)
    m = torch.full((5, 150), torch.nan, device=DEVICE)
    gate(group.product(TILES["split"]), m, group.added)
    g, u = group.exact().split(150, 1)
    close(m, F.silu(g) * u)


def test_add_norm_of_nothing_added() -> None:
    group = Group(3, 40, (8,))
    x, before = torch.empty_like(group.x), group.x.clone()
    gain = group.randn(40)
    add_norm(group.x, None, gain, x, EPS)
    assert torch.equal(group.x, before)
    close(x, norm(before.double(), gain))


FORMS = ["by token", "by slot", "base"]


@pytest.mark.parametrize("T", [4, 70])
@pytest.mark.parametrize("form", FORMS)
def test_the_scale_of_a_norm_comes_later(form: str, T: int) -> None:
    group = Group(T, 64, (300,))
    y = group.product(TILES["split"], form != "base", form == "by slot")
    gain, x, residual = group.randn(300), torch.full((T, 300), torch.nan, device=DEVICE), group.randn(T, 300)
    expected = residual.double() + group.exact(form != "base")
    scale = Scale.of(T, 300, EPS, torch.float32, DEVICE)
    assert scale is not None
    scale.squares.fill_(torch.nan)
    add_norm(residual, y, gain, x, EPS, group.added if form != "base" else None, scale=scale)
    close(residual, expected)
    assert scale.parts is not None
    squares = scale.squares.flatten()[: T * scale.parts].view(T, -1).sum(1, keepdim=True)
    close(x * (squares / 300 + EPS).rsqrt(), norm(expected, gain))


@pytest.mark.parametrize("block", [64, 128])
def test_a_norms_scale_knows_how_many_parts_were_written(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale.of(3, 300, EPS, torch.float32, DEVICE)
    assert scale is not None
    scale.squares.fill_(torch.nan)
    monkeypatch.setattr(epilogue_token, "COLUMNS", block)
    group = Group(3, 64, (300,))
    gain, x, residual = group.randn(300), torch.empty(3, 300, device=DEVICE), group.randn(3, 300)
    expected = (residual.double() + group.exact(False)).square().sum(1, keepdim=True) / 300
    add_norm(residual, group.product(TILES["split"], False), gain, x, EPS, scale=scale)
    product = torch.ones(1, 3, 2 * 40, device=DEVICE)
    m = torch.empty(3, 40, device=DEVICE)
    gate(product, m, scale=scale)
    ones = (expected + EPS).rsqrt().expand(3, 40)
    close(m, F.silu(ones) * ones)


def test_float16_has_its_norms_at_once() -> None:
    assert Scale.of(1, 8, EPS, torch.float16, DEVICE) is None


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("form", FORMS)
def test_gate(form: str, scaled: bool) -> None:
    group = Group(4, 64, (150, 150))
    m = torch.full((4, 150), torch.nan, device=DEVICE)
    y = group.product(TILES["split"], form != "base", form == "by slot")
    scale, factor = random_scale(group) if scaled else (None, 1.0)
    gate(y, m, group.added if form != "base" else None, scale=scale)
    g, u = (group.exact(form != "base") * factor).split(150, 1)
    close(m, F.silu(g) * u)


@pytest.mark.parametrize("form", ["by token", "by slot"])
@pytest.mark.parametrize("kind", ["plain", "normed", "bias"])
@pytest.mark.parametrize("width", [16, 24], ids=["width 16", "width 24"])
def test_heads(kind: str, width: int, form: str) -> None:
    T, H, G, longest = 3, 4, 2, 9
    group = Group(T, 64, (H * width, G * width, G * width))
    bias = group.randn((H + 2 * G) * width) if kind == "bias" else None
    gains = (group.randn(width), group.randn(width))
    angle = torch.outer(torch.arange(20.0), torch.logspace(0, -2, width // 2)).to(DEVICE)
    positions, length = torch.tensor([7, 3, 19], device=DEVICE), torch.tensor([7, -1, 2], device=DEVICE)
    q = torch.full((T, H, width), torch.nan, device=DEVICE)
    keys, values = torch.zeros(2, T, G, longest, width, device=DEVICE).unbind(0)
    y = group.product(TILES["split"], by_slot=form == "by slot")
    scale, factor = random_scale(group) if kind != "plain" else (None, 1.0)
    heads(
        y, bias, q.unsqueeze(1), keys, values, (*gains, EPS) if kind == "normed" else None,
        (angle.cos(), angle.sin()), positions, length, group.added, scale=scale,
    )  # fmt: skip
    y = group.exact() * factor + (bias.double() if bias is not None else 0)
    expected = [part.view(T, -1, width) for part in y.split(group.outputs, 1)]
    for index, gain in enumerate(gains):
        part = expected[index]
        if kind == "normed":
            part = norm(part, gain)
        cos, sin = (f(angle[positions].double()).repeat(1, 2).unsqueeze(1) for f in (torch.cos, torch.sin))
        low, high = part.chunk(2, -1)
        expected[index] = part * cos + torch.cat([-high, low], -1) * sin
    close(q, expected[0])
    for cache, new in ((keys, expected[1]), (values, expected[2])):
        for n, place in ((0, 7), (2, 2)):
            close(cache[n, :, place], new[n])
            cache[n, :, place] = 0
        assert not cache.any()  # and nothing of the sequence that is not there


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda mask: mask,
    "left padding": lambda mask: mask.index_fill(1, torch.arange(70, device=DEVICE), False),
    "holes": lambda mask: mask & (torch.arange(mask.shape[1], device=DEVICE) % 3 > 0),
}


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 4, 2, 16, 150), (3, 3, 3, 24, 300), (2, 8, 1, 64, 100)], ids=str)
def test_attention(shape: tuple[int, ...], mask: str, parts: int) -> None:
    N, H, G, width, longest = shape
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(N, H, width, generator=generator).to(DEVICE)
    keys, values = torch.randn(2, N, G, longest, width, generator=generator).to(DEVICE).unbind(0)
    seen = MASKS[mask](torch.ones(N, longest, dtype=torch.bool, device=DEVICE))
    lengths = [83, 90, -1][:N]
    for n, length in enumerate(lengths):  # what was never written is not read
        keys[n, :, length + 1 :], values[n, :, length + 1 :] = torch.nan, torch.nan
    out = torch.full_like(q, torch.nan)
    Attention(N, H, width, AttentionTile(32, parts), DEVICE)(
        out, q, keys, values, seen, torch.tensor(lengths, device=DEVICE), width**-0.5
    )
    for n, length in enumerate(lengths):
        if length < 0:
            assert not out[n].any()
            continue
        here = slice(0, length + 1)
        expected = F.scaled_dot_product_attention(
            q[n].double().unsqueeze(1), keys[n, :, here].double(), values[n, :, here].double(), seen[n, None, here],
            enable_gqa=True,
        )  # fmt: skip
        close(out[n], expected.squeeze(1))
