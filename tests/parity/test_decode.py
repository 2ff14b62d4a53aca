"""Generation by the decode step of few launches is generation by ``transformers``; on a GPU the step is captured."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from molora import MoLoRAModel, Stack, StackLayer
from molora.decode import DecodeStep
from tests.conftest import DEVICE, make_base, write_adapter
from tests.parity.test_equalities import ROUTED, make_routed

AUTO = {"personality": None, "domain": "auto", "user": "ada"}
TOKENS = 5 if DEVICE.type == "cuda" else 3  # the interpreter takes seconds a step


def write_adapters(base: Any, folder: Path) -> dict[str, Path]:
    names = ("math", "code", "sage", "ada")
    return {name: write_adapter(base, folder / name, seed) for seed, name in enumerate(names)}


class Both:
    """A model that decodes by the step, and its copy that decodes as ``transformers`` does."""

    def __init__(self, model: MoLoRAModel, plain: MoLoRAModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.plain = model, plain
        compiled = CompileConfig()
        compiled._compile_all_devices = True  # generate asks for a captured step on accelerators alone
        self.model.base.generation_config.compile_config = compiled
        self.steps = 0
        call = DecodeStep.__call__

        def counted(step: DecodeStep, ids: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return call(step, ids)

        monkeypatch.setattr(DecodeStep, "__call__", counted)

    @classmethod
    def routed(cls, base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **config: Any) -> "Both":
        with monkeypatch.context() as here:
            here.setattr("molora.adapted.backend_for", lambda _: "triton")
            model = make_routed(base, adapters, **config)
        return cls(model, make_routed(base, adapters, **config), monkeypatch)

    def check(self, *args: Any, taken: bool = True, **options: Any) -> torch.Tensor:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, **options}
        before = self.steps
        found = self.model.generate(*args, **options)
        assert (self.steps > before) == taken, "the step was not taken" if taken else "the step was taken"
        theirs = self.plain.generate(*args, **{**options, "disable_compile": True})
        if taken:
            assert self.steps - before == found.shape[1] - args[0].shape[1] - 1
        assert torch.equal(found, theirs)
        return found


@pytest.fixture
def ids(ids: torch.Tensor) -> torch.Tensor:
    return ids if DEVICE.type == "cuda" else ids[:, :5]


@pytest.fixture
def both(base: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Both:
    return Both.routed(base, adapters, monkeypatch, reads=(0, 2))


# A case of many steps, which the interpreter takes minutes for; the kernels themselves run there in tests/kernels.
many_steps = pytest.mark.gpu


def on_gpu(value: Any) -> Any:
    """A case that only a GPU runs: the interpreter takes seconds a step."""
    return pytest.param(value, marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    "kind", ["softmax-top2", *(on_gpu(kind) for kind in ("two-routers", "embedding", "no-memory", "layer-1"))]
)
def test_greedy_tokens(
    kind: str, base: Any, adapters: dict[str, Path], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Both.routed(base, adapters, monkeypatch, **ROUTED[kind]).check(ids, selection=AUTO)


@pytest.mark.parametrize("family", ["qwen3", on_gpu("mistral")])
def test_other_families(family: str, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(family)
    adapters = write_adapters(base, tmp_path)
    Both.routed(base, adapters, monkeypatch, reads=0).check(ids, selection=AUTO)


def test_padding_and_selections(both: Both, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    selections = [AUTO, {"personality": "sage", "domain": None, "user": None}, {"domain": ["math"]}]
    both.check(ids, attention_mask=mask, selection=selections)
    selections[1] = {"domain": {"math": 0.7, "code": -0.5}, "user": {"ada": 1.5}}  # a column more
    both.check(ids, attention_mask=mask, selection=selections)


@many_steps
def test_batches_and_samples(both: Both, ids: torch.Tensor) -> None:
    both.check(ids, selection=AUTO)
    both.check(ids[:2], selection=AUTO)  # another batch
    torch.manual_seed(0)
    found = both.model.generate(ids, selection=AUTO, do_sample=True, num_return_sequences=2, max_new_tokens=TOKENS)
    torch.manual_seed(0)
    theirs = both.plain.generate(
        ids, selection=AUTO, do_sample=True, num_return_sequences=2, max_new_tokens=TOKENS, disable_compile=True
    )
    assert torch.equal(found, theirs)


@many_steps
def test_one_capture_serves_swaps_selections_and_sequences(both: Both, tmp_path: Path, ids: torch.Tensor) -> None:
    both.check(ids, selection=AUTO)
    (_, step), *others = both.model.steps._steps.values()
    assert not others
    law = write_adapter(make_base(), tmp_path / "law", 9, r=7)
    for turn, selection in enumerate([{"domain": "math"}, {"domain": None}, AUTO, {"domain": "code", "user": None}]):
        for model in (both.model, both.plain):
            model.replace_adapter("domain", ("math", "code")[turn % 2], law)
        both.check(ids.flip(turn % 2)[:, turn % 3 :], selection=selection)
    assert [step] == [step for _, step in both.model.steps._steps.values()]


@many_steps
def test_an_adapter_that_comes_later(both: Both, tmp_path: Path, ids: torch.Tensor) -> None:
    both.check(ids, selection=AUTO)
    wide = write_adapter(make_base(), tmp_path / "wide", 9, r=40)
    for model in (both.model, both.plain):
        model.add_adapter("domain", "wide", wide)
    both.check(ids, selection={"domain": "wide"})
    for model in (both.model, both.plain):
        model.remove_adapter("domain", "math")
    both.check(ids, selection=AUTO)


def test_an_adapted_head_without_a_router(tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("qwen3")
    path = write_adapter(base, tmp_path / "a", 1, target_modules=["lm_head", "q_proj", "down_proj"])
    stack = Stack([StackLayer("any", {"a": path})])
    made = [MoLoRAModel.from_base(copy.deepcopy(base), stack, backend=name) for name in ("triton", "torch")]
    both = Both(*made, monkeypatch)
    both.check(ids, selection={"any": "a"})


@many_steps
def test_a_prompt_in_pieces(both: Both, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    found = both.model.generate(ids, selection=AUTO, prefill_chunk_size=3, **options)
    assert both.steps >= TOKENS - 1  # a last piece of one token is a step too
    assert torch.equal(found, both.plain.generate(ids, selection=AUTO, disable_compile=True, **options))


def test_streamed_routes(both: Both, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": TOKENS, "eos_token_id": None}
    found = list(both.model.stream(ids[:1], selection=AUTO, **options))
    assert both.steps == TOKENS - 1
    theirs = list(both.plain.stream(ids[:1], selection=AUTO, disable_compile=True, **options))
    assert [(t.token_id, t.route) for t in found] == [(t.token_id, t.route) for t in theirs]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        on_gpu({"use_cache": False}),
        on_gpu({"cache_implementation": "dynamic"}),
        on_gpu({"disable_compile": True}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_step_leaves_to_transformers(options: dict[str, Any], both: Both, ids: torch.Tensor) -> None:
    both.check(ids[:1, :3], selection=AUTO, taken=False, max_new_tokens=2, **options)


def test_a_base_that_the_step_does_not_know(tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("gemma3")
    adapters = write_adapters(base, tmp_path)
    Both.routed(base, adapters, monkeypatch, reads=0).check(ids[:1, :3], selection=AUTO, taken=False, max_new_tokens=2)


def test_the_bases_own_generation_is_left_alone(both: Both, ids: torch.Tensor) -> None:
    both.check(ids[:1, :3], selection=AUTO)
    assert "get_compiled_call" not in vars(both.model.base)


@many_steps
def test_steps_are_kept_and_forgotten(both: Both, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora.captured._KEPT", 2)
    for batch in (1, 2, 1, 3):
        both.model.generate(ids[:batch, :2], selection=AUTO, max_new_tokens=2, eos_token_id=None)
    assert [size[0] for size in both.model.steps._steps] == [1, 3]
    copy.deepcopy(both.model)  # graphs and caches are not copied
    assert both.steps == 4


def test_the_fused_base_saves_as_before(both: Both, ids: torch.Tensor, tmp_path: Path) -> None:
    both.model.generate(ids[:1, :2], selection=AUTO, max_new_tokens=2, eos_token_id=None)
    both.model.base.save_pretrained(tmp_path)
    again = type(both.model.base).from_pretrained(tmp_path).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, both.plain.base(ids).logits)
