"""A prompt by our own kernels is the same prompt by ``transformers``: logits, keys and values, routes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora.prompt import PromptPass
from molora_kernels import forms
from tests.conftest import make_base
from tests.parity.test_decode import AUTO, Both, write_adapters

LONG = 26  # tokens of each of three sequences: more than are taken one by one


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the prompts that the kernels read."""
    shapes: list[tuple[int, ...]] = []
    call = PromptPass.__call__

    def counted(self: PromptPass, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return call(self, ids, *args, **kwargs)

    monkeypatch.setattr(PromptPass, "__call__", counted)
    return shapes


@pytest.mark.parametrize("case", ["padded, column by column", "qwen3", "in pieces"])
def test_a_prompt(
    case: str, base: Any, adapters: dict[str, Path], tmp_path: Path, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if case == "qwen3":
        base = make_base("qwen3")
        adapters = write_adapters(base, tmp_path)
    both = Both.routed(base, adapters, monkeypatch, reads=0 if case == "qwen3" else (0, 2))
    ids = torch.randint(3, 97, (3, LONG), generator=torch.Generator().manual_seed(2)).to(base.device)
    if case == "padded, column by column":
        monkeypatch.setattr(forms, "TOGETHER", 0)
        options["attention_mask"] = torch.ones_like(ids)
        options["attention_mask"][1, :5] = 0
    if case == "in pieces":
        options["prefill_chunk_size"] = 23
    found = [
        model.generate(
            ids, selection=AUTO, max_new_tokens=2, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=not own, disable_compile=not own, **options,
        )
        for model, own in ((both.model, True), (both.plain, False))
    ]  # fmt: skip
    assert read == ([(3, 23), (3, 3)] if case == "in pieces" else [(3, LONG)])
    assert torch.equal(found[0], found[1].sequences)
    (_, step), *_ = both.model.steps._steps.values()
    length = step.cache.length
    for mine, theirs in zip(step.cache.layers, found[1].past_key_values.layers, strict=True):
        for own, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            seen = torch.ones_like(other[:, :1, :, :1], dtype=torch.bool)
            if "attention_mask" in options:
                seen[1, :, :5] = False
            close = (own[:, :, :length] - other).masked_fill(~seen, 0)
            assert close.norm() <= 1e-5 * other.norm()


def test_somebody_elses_forward_is_left_alone(
    base: Any, adapters: dict[str, Path], ids: torch.Tensor, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both.routed(base, adapters, monkeypatch, reads=0)
    forward = both.model.base.forward
    both.check(ids[:1, :4], selection=AUTO)
    assert len(read) == 1 and "forward" not in vars(both.model.base)
    both.model.base.forward = forward
    both.check(ids[:1, :4], selection=AUTO)
    assert len(read) == 1 and both.model.base.forward is forward
