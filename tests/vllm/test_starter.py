"""The starter stack, whose router reads the embedding and the hidden state at layer 4, on its real base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molora import MoLoRAModel
from molora.base import base_folder
from molora.errors import BaseModelError
from molora.starter import starter_folder
from molora.vllm.export import export
from molora.vllm.folder import read_manifest
from tests.vllm.conftest import Served, check, expected
from tests.vllm.test_server import Server, same

TEXTS = {
    "math": "Question: Natalia sold 48 clips in April, and half as many in May. How many clips did she sell? Answer:",
    "code": "def binary_search(items, wanted):\n    low, high = 0, len(items) - 1\n    while low <= high:\n",
    "medicine": "A 54-year-old man has had chest pain and been short of breath for two hours. The likely diagnosis is",
    "law": "This Agreement shall be governed by the laws of the State of Delaware. Neither party may assign",
    "ukrainian": "Сьогодні в Києві гарна погода, і ми з друзями йдемо гуляти до парку. Потім",
}


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        return base_folder("HuggingFaceTB/SmolLM2-135M-Instruct")
    except BaseModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def starter(base: Path) -> dict[str, MoLoRAModel]:
    model = MoLoRAModel.from_pretrained(starter_folder(), base=base, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every answer has as many tokens
    return {"starter": model}


@pytest.fixture(scope="module")
def prompts(starter: dict[str, MoLoRAModel]) -> dict[str, list[int]]:
    return {name: starter["starter"].tokenizer(text)["input_ids"] for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(starter_folder(), tmp_path_factory.mktemp("starter"))


def serve(base: Path, exported: Path, **options: Any) -> Served:
    adapters = {"code": starter_folder() / "adapters" / "domain" / "code"}
    return Served(base, {"starter": exported}, adapters, max_lora_rank=read_manifest(exported)["rank"], **options)


@pytest.fixture(scope="module")
def served(base: Path, exported: Path) -> Served:
    """With the prefix cache, and prompts that are read 48 tokens at a time."""
    return serve(base, exported, enable_prefix_caching=True, max_num_batched_tokens=48)


def test_both_reads_route(starter: dict[str, MoLoRAModel], prompts: dict[str, list[int]]) -> None:
    """So that the equalities say something: the second read changes what acts."""
    model = starter["starter"]
    acted: set[int] = set()
    changed = 0
    for prompt in prompts.values():
        with model.routing.active(lambda: model._resolve({})):
            model.base(input_ids=torch.tensor([prompt]))
            first, second = (plan.slots for plan in model.routing.plans if plan is not None)
        changed += int((first != second).any(-1).sum())
        acted.update(second.flatten().tolist())
    print(changed, "tokens changed,", acted, "acted")
    assert changed >= 5 and len(acted) >= 4


def test_each_prompt_alone(served: Served, starter: Any, prompts: dict[str, list[int]]) -> None:
    for name, prompt in prompts.items():
        answers, _ = served.ask(["starter"], [prompt])
        print(name, "largest difference", check(answers[0], expected(starter, "starter", prompt)))


def test_mixed_requests_in_one_batch(served: Served, starter: Any, prompts: dict[str, list[int]]) -> None:
    """The stack, with selections of the requests' own, beside the base and one of the adapters as vLLM runs it."""
    choices: list[Any] = [None, None, None, {"personality": "pirate"}, {"domain": ["math", "law"], "user": "jackson"}]
    kinds = ["starter", "base", "starter", "starter", "starter", "code"]
    asked = [*prompts.values(), prompts["code"]]
    answers, _ = served.ask(kinds, asked, [*choices, None])
    wanted = [{}, {"domain": None}, {}, *choices[3:], {"domain": "code"}]
    for prompt, choice, answer in zip(asked, wanted, answers, strict=True):
        print("largest difference", check(answer, expected(starter, "starter", prompt, choice)))


def test_chunked_prefill_and_prefix_cache(served: Served, starter: Any, prompts: dict[str, list[int]]) -> None:
    """A prompt of several subjects, of four chunks; asked again, and with another end."""
    long = [token for prompt in prompts.values() for token in prompt]
    assert len(long) > 3 * 48
    wanted = expected(starter, "starter", long)
    for hit in (False, True):
        answers, cached = served.ask(["starter"], [long])
        assert (cached[0] >= 128) is hit
        check(answers[0], wanted)
    other = long[:100] + prompts["code"]
    answers, cached = served.ask(["starter"], [other])
    assert cached[0] == 96
    check(answers[0], expected(starter, "starter", other))


def test_preempted_requests_are_read_again(
    base: Path, exported: Path, starter: Any, prompts: dict[str, list[int]]
) -> None:
    """So few KV blocks that requests are put back while they decode; without a prefix cache they begin anew."""
    few = {"num_gpu_blocks_override": 9, "max_model_len": 256, "enable_prefix_caching": False}
    served = serve(base, exported, **few, disable_log_stats=False)
    mixed = [token for prompt in prompts.values() for token in prompt]
    asked = [mixed[place : place + 60] for place in (0, 20, 40, 60)]
    answers, _ = served.ask(["starter"] * 4, asked)
    for prompt, answer in zip(asked, answers, strict=True):
        check(answer, expected(starter, "starter", prompt))
    counts = [metric.value for metric in served.llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert counts and counts[0] > 0


def test_tensor_parallel(base: Path, exported: Path, starter: Any, prompts: Any, tmp_path: Path) -> None:
    """Three workers: the base has nine heads."""
    rank = str(read_manifest(exported)["rank"])
    started = Server(
        base, tmp_path / "log", "--tensor-parallel-size", "3", "--max-lora-rank", rank,
        "--lora-modules", f"starter={exported}",
    )  # fmt: skip
    try:
        started.wait()
        for name in ("math", "ukrainian"):
            same(started.complete("starter", prompts[name]), expected(starter, "starter", prompts[name]))
    finally:
        started.stop()
