"""Adapters in pages: they grow, move and keep what they hold; a cache in fixed memory counts on the host."""

from pathlib import Path

import pytest
import torch

from molora import MoLoRAModel, Stack, StackLayer
from molora.errors import CacheError, UnsupportedAdapterError
from molora.groups import AdapterGroup, siblings
from molora.step_cache import StepCache
from molora_kernels import Factors
from tests.conftest import DEVICE, make_base, write_adapter


def make_factors(rank: int, out: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, 8, generator=generator).to(DEVICE), torch.randn(rank, out, generator=generator).to(DEVICE)
    )


def held(group: AdapterGroup, slot: int, piece: int, rank: int) -> Factors:
    A, B = group.pages.factors(piece)[slot]
    assert not A[rank:].any() and not B[rank:].any()
    return Factors(A[:rank], B[:rank])


def test_siblings_share_an_input() -> None:
    assert siblings("model.layers.1.self_attn.k_proj") == tuple(
        f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")
    )
    assert siblings("model.layers.1.mlp.up_proj") == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert siblings("lm_head") == ("lm_head",)


def test_pages_grow_with_slots_ranks_and_numbers() -> None:
    group = AdapterGroup(("q", "k"), 8, (6, 4), torch.float32, DEVICE)
    ranks = {0: 3, 1: 16, 40: 5, 2: 100, 3: 256, 4: 17}
    for slot, rank in ranks.items():
        for piece, out in enumerate((6, 4)):
            group.put(slot, piece, make_factors(rank, out, slot))
    grown = group.version
    assert grown > 0
    for slot, rank in ranks.items():
        for piece, out in enumerate((6, 4)):
            for mine, given in zip(held(group, slot, piece, rank), make_factors(rank, out, slot), strict=True):
                assert torch.equal(mine, given)
    group.put(2, 0, None)
    group.put(2, 0, make_factors(64, 6, 9))  # into the room that it left
    assert group.version == grown
    assert 2 in group.pages.factors(1)


def test_adapters_come_into_reserved_pages_without_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in ("_FIRST_SLOTS", "_FIRST_PAGES"):
        monkeypatch.setattr(f"molora.groups.{first}", 1)
    path = write_adapter(make_base(), tmp_path / "a", 1)
    moves = {}
    for reserved in (0, 7):
        model = MoLoRAModel.from_base(make_base(), Stack([StackLayer("any", {"first": path})]), backend="triton")
        model.adapted.reserve(reserved)
        before = {name: group.version for name, group in model.adapted.groups.items()}
        for number in range(6):
            model.add_adapter("any", f"a{number}", path)
        moves[reserved] = sum(group.version - before[name] for name, group in model.adapted.groups.items())
    assert moves[0] > 0 == moves[7]


def test_a_rank_over_the_kernels_largest() -> None:
    group = AdapterGroup(("o",), 8, (6,), torch.float32, DEVICE)
    with pytest.raises(ValueError, match="Rank 257 is over 256"):
        group.put(0, 0, make_factors(257, 6, 0))
    assert not group.pages.adapted(0)


def test_an_adapter_over_the_largest_rank_is_refused_whole(tmp_path: Path) -> None:
    path = write_adapter(make_base(), tmp_path / "wide", 1, r=300, target_modules=["o_proj"])
    base = make_base()
    with pytest.raises(UnsupportedAdapterError, match=r"rank 300 at .*o_proj.*backend='torch'"):
        MoLoRAModel.from_base(base, Stack([StackLayer("any", {"wide": path})]), backend="triton")
    assert not any(type(module).__name__ == "MoLoRALinear" for module in base.modules())
    MoLoRAModel.from_base(base, Stack([StackLayer("any", {"wide": path})]), backend="torch")


def test_a_cache_in_fixed_memory() -> None:
    cache = StepCache(torch.zeros(2, 2, 1, 2, 6, 4, device=DEVICE))
    address = cache.memory.data_ptr()
    states = torch.randn(1, 2, 4, 4, device=DEVICE)
    for layer in range(2):
        keys, values = cache.update(states, -states, layer)
        assert torch.equal(keys, states) and torch.equal(values, -states)
    assert cache.length == 4 and cache.get_mask_sizes(1, 0) == (5, 0) and cache.get_max_length() == 6
    with pytest.raises(CacheError, match="up to 6 tokens, not for 1 of 8"):
        cache.update(states, states, 0)
    with pytest.raises(CacheError, match="for 1 sequences"):
        cache.update(states[:, :, :1].repeat(2, 1, 1, 1), states[:, :, :1].repeat(2, 1, 1, 1), 0)
    cache.advance()
    assert [layer.length for layer in cache.layers] == [5, 5]
    cache.crop(3)
    keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert torch.equal(keys, torch.cat([states[:, :, :3], states[:, :, :1]], 2))
    cache.crop(-1)
    assert cache.layers[0].length == 3
    cache.reset()
    assert cache.length == 0 and cache.memory.data_ptr() == address
