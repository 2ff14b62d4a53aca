"""Engines that are set up otherwise."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import Served, check, expected, make_adapters, make_base, make_folders, make_models, prompt_of

KINDS = ["averages", "base", "gated", "code"]


def compare(served: Served, models: Any, lengths: tuple[int, ...]) -> None:
    kinds = [KINDS[place % len(KINDS)] for place in range(len(lengths))]
    prompts = [prompt_of(length, 100 + place, 97) for place, length in enumerate(lengths)]
    answers, _ = served.ask(kinds, prompts)
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        check(answer, expected(models, kind, prompt))


def test_preempted_requests_are_read_again(
    base: Path, folders: dict[str, Path], adapters: dict[str, Path], models: Any
) -> None:
    """So few KV blocks that requests are put back while they decode; without a prefix cache they begin anew."""
    served = Served(
        base, folders, adapters, num_gpu_blocks_override=14, enable_prefix_caching=False, disable_log_stats=False
    )
    compare(served, models, (60, 61, 62, 63, 60, 61, 62))
    counts = [metric.value for metric in served.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert counts and counts[0] > 0


def test_another_family(tmp_path: Path) -> None:
    """Qwen 3, with tied embeddings and a vocabulary that vLLM pads."""
    base = make_base(tmp_path / "base", "qwen3")
    adapters = make_adapters(base, tmp_path / "adapters")
    models = make_models(base, adapters)
    served = Served(base, make_folders(models, tmp_path / "exported"), adapters, max_num_batched_tokens=48)
    compare(served, models, (20, 7, 100, 30, 5, 11, 9))


def test_memory_beside_sliding_windows_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3")
    adapters = make_adapters(base, tmp_path / "adapters")
    folders = make_folders(make_models(base, adapters), tmp_path / "exported")
    served = Served(base, folders, adapters)
    with pytest.raises(Exception, match="full attention only, and this model has"):
        served.llm.llm_engine.add_lora(served.requests["averages"])
