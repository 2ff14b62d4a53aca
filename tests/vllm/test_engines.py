"""Engines that are set up otherwise."""

from pathlib import Path
from typing import Any

import pytest

from molora.vllm import plugin, routed
from molora.vllm.folder import request
from tests.vllm.conftest import Served, check, expected, make_adapters, make_base, make_folders, make_models, prompt_of

KINDS = ["averages", "base", "gated", "code", "twice", "deep", "twice"]


def compare(served: Served, models: Any, lengths: tuple[int, ...]) -> None:
    kinds = KINDS[: len(lengths)]
    prompts = [prompt_of(length, 100 + place, 97) for place, length in enumerate(lengths)]
    answers, _ = served.ask(kinds, prompts)
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        check(answer, expected(models, kind, prompt))


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests_are_read_again(
    base: Path, folders: dict[str, Path], adapters: dict[str, Path], models: Any, caching: bool
) -> None:
    """So few KV blocks that the last are put back while they decode; without a prefix cache they begin anew, and with
    it they go on from what is left of them."""
    served = Served(
        base, folders, adapters, num_gpu_blocks_override=14, enable_prefix_caching=caching, disable_log_stats=False
    )
    compare(served, models, (60, 61, 62, 63, 60, 61, 62))
    counts = [metric.value for metric in served.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert counts and counts[0] > 0


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_another_family(family: str, tmp_path: Path) -> None:
    """Qwen 3, with tied embeddings and a vocabulary that vLLM pads; Granite, whose layers are handed no residual."""
    base = make_base(tmp_path / "base", family)
    adapters = make_adapters(base, tmp_path / "adapters")
    models = make_models(base, adapters)
    served = Served(base, make_folders(models, tmp_path / "exported"), adapters, max_num_batched_tokens=48)
    compare(served, models, (20, 7, 100, 30, 5, 11, 9))


def test_what_a_model_does_not_show_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3: a memory beside sliding windows, hidden states of which vLLM does not say what they are; and a stack of
    another base."""
    base = make_base(tmp_path / "base", "gemma3")
    adapters = make_adapters(base, tmp_path / "adapters")
    own = make_folders(make_models(base, adapters), tmp_path / "exported")
    served = Served(base, own, adapters)
    for asked, message in (
        (served.requests["averages"], "full attention only, and this model has"),
        (served.requests["twice"], "the hidden state at layer 1, which vLLM's Gemma3ForCausalLM does not show"),
        (request(folders["gated"]), "reads 64 features, and the base has 48"),
    ):
        with pytest.raises(Exception, match=message):
            served.llm.llm_engine.add_lora(asked)


def test_what_gpus_run(
    base: Path, folders: dict[str, Path], adapters: dict[str, Path], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of vLLM's GPU build and the one that routes single tokens, in Triton's interpreter."""
    theirs = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    monkeypatch.setitem(plugin._ROUTED, theirs, "tests.vllm.interpreted.Interpreted")
    monkeypatch.setattr(routed, "backend_for", lambda device: "triton")
    served = Served(base, folders, adapters, max_loras=3, max_num_batched_tokens=48, enable_prefix_caching=True)
    compare(served, models, (60, 20, 9, 21))
    # In the second step the first decodes, the next is read, and the others, of one token more than the prefix cache
    # hands on, go on from that: two groups of single tokens, of which one waits. Selections that say the same are two.
    prompts = [prompt_of(48, 90, 97), *[prompt_of(33, 91, 97)] * 3]
    answers, cached = served.ask(["averages"] * 4, prompts, [None, None, None, {}])
    assert cached == [0, 0, 32, 0]
    for prompt, answer in zip(prompts, answers, strict=True):
        check(answer, expected(models, "averages", prompt))
