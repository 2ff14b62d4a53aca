"""Every way of generating, against itself without a cache, and caches that are carried on by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.errors import CacheError
from molora.router import Router
from molora.selection import router_rows
from tests.conftest import make_base, write_adapter
from tests.parity.test_equalities import ROUTED, close, make_routed, make_stack


@pytest.fixture
def model(base: Any, adapters: dict[str, Path]) -> MoLoRAModel:
    return make_routed(base, adapters)


SELECTION: dict[str, Any] = {"personality": "sage", "domain": "auto", "user": ["ada"]}
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "beams sampled": {"num_beams": 2, "do_sample": True},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "sampled returned": {"do_sample": True, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "guidance": {"guidance_scale": 1.5},
    "min-p": {"do_sample": True, "min_p": 0.1},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("kind", ["embedding", "two-routers"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_cached_is_uncached(way: str, kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, **WAYS[way]}
    runs = []
    for more in ({}, {}, {"use_cache": False}):
        if more and way == "chunked prefill":
            options.pop("prefill_chunk_size")
        torch.manual_seed(4)
        runs.append(model.generate(input_ids=ids, selection=SELECTION, **options, **more))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert runs[0].shape[0] == 3 * options.get("num_return_sequences", 1)


@torch.no_grad()
def test_beams_of_different_selections_are_each_alone(model: MoLoRAModel, ids: torch.Tensor) -> None:
    selections = [SELECTION, {"domain": "code"}, {"domain": None}]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "do_sample": False}
    options["eos_token_id"] = None
    batch = model.generate(input_ids=ids, selection=selections, **options)
    for row, selection in enumerate(selections):
        alone = model.generate(input_ids=ids[row : row + 1], selection=selection, **options)
        assert torch.equal(batch[2 * row : 2 * row + 2], alone)


@pytest.mark.parametrize("kind", ["embedding", "two-routers", "softmax-top2"])
@pytest.mark.parametrize("assistant", ["prompt lookup", "model"])
@torch.no_grad()
def test_speculation_changes_nothing(
    assistant: str, kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor
) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    ids = ids[:1].repeat(1, 3)  # so that there is something to look up
    options: dict[str, Any] = {"selection": SELECTION, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(input_ids=ids, **options)
    helper = {"prompt_lookup_num_tokens": 3} if assistant == "prompt lookup" else {"assistant_model": make_base()}
    assert torch.equal(model.generate(input_ids=ids, **helper, **options), greedy)


@torch.no_grad()
def test_generation_from_embeddings(model: MoLoRAModel, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"selection": SELECTION, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    embeds = model.base.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, ids.shape[1] :])


@torch.no_grad()
def test_generate_takes_ids_by_place(model: MoLoRAModel, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"selection": SELECTION, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(input_ids=ids, **options))


@torch.no_grad()
def test_a_sliding_window(tmp_path: Path, ids: torch.Tensor) -> None:
    base = make_base("gemma3")
    stack = Stack([StackLayer("a", {"x": write_adapter(base, tmp_path / "x", 1)})])
    model = MoLoRAModel.from_base(base, stack, RouterConfig(width=8, hidden=16, reads=(0, 2))).eval()
    for part in model.router.parts:
        torch.nn.init.normal_(part.output.weight, std=3.0)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    one = {"input_ids": ids[:1], "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(**one, **options), model.generate(input_ids=ids[:1], **options))


@pytest.mark.parametrize("kind", ROUTED)
@torch.no_grad()
def test_a_second_turn_is_the_whole(kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    options: dict[str, Any] = {"selection": SELECTION, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
    text = torch.cat([first.sequences, ids.flip(1)], 1)
    second = model.generate(input_ids=text, past_key_values=first.past_key_values, **options)
    assert torch.equal(second, model.generate(input_ids=text, **options))


@pytest.mark.parametrize("first", [{"domain": "math"}, {"domain": None}, {"domain": ["code"]}], ids=str)
@torch.no_grad()
def test_another_selection_in_the_second_turn(first: Any, model: MoLoRAModel, ids: torch.Tensor) -> None:
    """The router remembers the first turn, though it was not asked there."""
    cache = model(ids[:, :9], selection=first, use_cache=True).past_key_values
    found = model(ids[:, 9:], selection=SELECTION, past_key_values=cache, output_routes=True).routes
    whole = model(ids, selection=SELECTION, output_routes=True).routes
    assert torch.equal(found.slots, whole.slots[:, 9:])
    close(found.logits[0], whole.logits[0][:, 9:])


@pytest.mark.parametrize("kind", ROUTED)
@torch.no_grad()
def test_cropped_and_continued(kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-6)
    again = ids.flip(1)[:, :6]
    found = model(again, past_key_values=cache, use_cache=True).logits
    close(found, model(torch.cat([ids[:, :11], again], 1)).logits[:, 11:])


@pytest.mark.parametrize("kind", ROUTED)
@torch.no_grad()
def test_sequences_of_a_cache_move(kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = make_routed(base, adapters, **ROUTED[kind])
    order = torch.tensor([2, 0])
    whole = model(ids).logits
    for move in ("batch_select_indices", "reorder_cache"):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        getattr(cache, move)(order)
        close(model(ids[order, 9:], past_key_values=cache, use_cache=True).logits, whole[order, 9:])
    cache = model(ids[:, :9], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, 0)
    close(model(twice[:, 9:], past_key_values=cache, use_cache=True).logits, whole.repeat_interleave(2, 0)[:, 9:])


@torch.no_grad()
def test_a_cache_that_was_reset(model: MoLoRAModel, ids: torch.Tensor) -> None:
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    expected = model(ids, past_key_values=cache, use_cache=True).logits
    cache.reset()
    close(model(ids, past_key_values=cache, use_cache=True).logits, expected)
    cache.reset()
    close(model(ids[:2], past_key_values=transformers.DynamicCache(), use_cache=True).logits, expected[:2])


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(model: MoLoRAModel, ids: torch.Tensor) -> None:
    """Reuse of a prefix: one cache, copied for each continuation."""
    prefix = model(ids[:, :9], use_cache=True).past_key_values
    whole = model(ids).logits
    for _ in range(2):
        found = model(ids[:, 9:], past_key_values=copy.deepcopy(prefix), use_cache=True).logits
        close(found, whole[:, 9:])


@torch.no_grad()
def test_the_cache_is_an_ordinary_one(model: MoLoRAModel, ids: torch.Tensor) -> None:
    cache = model(ids, use_cache=True).past_key_values
    assert isinstance(cache, transformers.DynamicCache) and cache.get_seq_length() == 17
    assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_a_cache_of_the_bare_base(model: MoLoRAModel, base: Any, ids: torch.Tensor) -> None:
    cache = base(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(CacheError, match="without the router"):
        model(ids[:, 9:], past_key_values=cache)
    with pytest.raises(CacheError, match="without the router"):
        model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)


@torch.no_grad()
def test_a_cache_of_another_batch(model: MoLoRAModel, ids: torch.Tensor) -> None:
    cache = model(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(CacheError, match="hold 3 sequences, and the batch has 2"):
        model(ids[:2, 9:], past_key_values=cache)


@pytest.mark.parametrize(
    "other", [{"width": 4}, {"decays": (0.5,)}, {"reads": (0, 1)}, {"decays": (0.3, 0.6)}], ids=str
)
@torch.no_grad()
def test_a_cache_of_another_router(other: Any, model: MoLoRAModel, ids: torch.Tensor) -> None:
    cache = model(ids[:, :9], use_cache=True).past_key_values
    config = RouterConfig(**{"width": 8, "hidden": 16, **other})
    model.set_router(Router(config, router_rows(model.stack), 32).eval())
    with pytest.raises(CacheError):
        model(ids[:, 9:], past_key_values=cache)


@torch.no_grad()
def test_the_base_cannot_grow_a_routed_cache_unseen(model: MoLoRAModel, ids: torch.Tensor) -> None:
    """Tokens that the bare base adds to a routed cache are missing from the memory."""
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model.base(ids[:, 5:9], past_key_values=cache, use_cache=True)
    with pytest.raises(CacheError):
        model(ids[:, 9:], past_key_values=cache)


@torch.no_grad()
def test_without_a_router_any_cache_does(base: Any, adapters: dict[str, Path], ids: torch.Tensor) -> None:
    model = MoLoRAModel.from_base(copy.deepcopy(base), make_stack(adapters))
    cache = model(ids[:, :9], selection={"domain": "math"}, use_cache=True).past_key_values
    found = model(ids[:, 9:], selection={"domain": "math"}, past_key_values=cache).logits
    close(found, model(ids, selection={"domain": "math"}).logits[:, 9:])


@torch.no_grad()
def test_right_padding_is_each_alone(model: MoLoRAModel, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = model(ids * mask, mask, selection=SELECTION).logits
    close(found[1, :6], model(ids[1:2, :6], selection=SELECTION).logits[0])
