"""vLLM with the plugin says what our own generate says. Without the plugin each of these fails: a stack would then be
the sum of all its adapters."""

from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from molora.errors import BackendError
from tests.vllm.conftest import SELECTIONS, Served, check, expected, prompt_of

STACKS = ("averages", "gated", "twice", "deep", "forced")


@pytest.mark.parametrize("kind", STACKS)
def test_one_request(served: Served, models: Any, kind: str) -> None:
    prompt = prompt_of(20, 1)
    answers, _ = served.ask([kind], [prompt])
    wanted = expected(models, kind, prompt)
    print(kind, "largest difference", check(answers[0], wanted))


def test_routes_change_and_matter(models: Any) -> None:
    """So that the equalities say something: routers choose differently from token to token, and by what they remember;
    what is read of the hidden state changes what acts; and every kind of request answers differently."""
    import torch

    prompt = prompt_of(60, 2)
    for kind in ("averages", "gated", "twice", "deep"):
        ids = torch.tensor([prompt])
        slots = models[kind](input_ids=ids, selection={}, output_routes=True).routes.slots[0]
        assert len({tuple(row) for row in slots.tolist()}) >= 3
        assert (slots[:, 1] == -1).any()  # null, in the column of the first choice
        after = models[kind](input_ids=ids[:, 30:], selection={}, output_routes=True).routes.slots[0]
        assert not torch.equal(after[:20], slots[30:50])  # the same tokens after another past
    with models["twice"].routing.active(lambda: models["twice"]._resolve({})):
        models["twice"].base(input_ids=ids)
        first, second = models["twice"].routing.plans
        assert (first.slots != second.slots).any(-1).float().mean() > 0.3
    answers = [expected(models, kind, prompt).logprobs for kind in SELECTIONS]
    assert len({tuple(round(value, 2) for value in answer) for answer in answers}) == len(SELECTIONS)


def test_mixed_requests_in_one_batch(served: Served, models: Any) -> None:
    kinds = ["base", "averages", "twice", "code", "deep", "gated", "forced", "twice"]
    prompts = [prompt_of(length, 10 + length) for length in (7, 19, 5, 11, 23, 14, 9, 3)]
    answers, _ = served.ask(kinds, prompts)
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        print(kind, "largest difference", check(answer, expected(models, kind, prompt)))


@pytest.mark.parametrize("kind", STACKS)
def test_prefix_cache_hands_the_memory_on(served: Served, models: Any, kind: str) -> None:
    prompt = prompt_of(70, 30)
    wanted = expected(models, kind, prompt)
    first, _ = served.ask([kind], [prompt])
    again, cached = served.ask([kind], [prompt])
    assert cached[0] >= 64
    check(first[0], wanted)
    check(again[0], wanted)
    longer = prompt[:50] + prompt_of(40, 31)  # the same beginning, another end
    answers, cached = served.ask([kind], [longer])
    assert cached[0] == 32
    check(answers[0], expected(models, kind, longer))


@pytest.mark.parametrize("kind", STACKS)
def test_chunked_prefill(served: Served, models: Any, kind: str) -> None:
    """Two prompts of 4 to 7 chunks, beside one that decodes already."""
    prompts = [prompt_of(8, 40), prompt_of(300, 41), prompt_of(190, 42)]
    answers, _ = served.ask([kind] * 3, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(answer, expected(models, kind, prompt))


def test_stacks_do_not_share_the_prefix_cache(served: Served, models: Any) -> None:
    prompt = prompt_of(80, 50)
    for kind in ("base", "averages", "gated", "twice", "deep", "forced"):
        answers, cached = served.ask([kind], [prompt])
        assert cached[0] == 0
        check(answers[0], expected(models, kind, prompt))
    _, cached = served.ask(["averages"], [prompt])
    assert cached[0] >= 64


def test_evicted_stack_comes_back(served: Served, models: Any, adapters: Any) -> None:
    """More adapters than vLLM has slots: the stack is read again, into another slot, and goes on from what the prefix
    cache has of it."""
    from vllm.lora.request import LoRARequest

    prompt = prompt_of(40, 60)
    served.ask(["averages", "twice"], [prompt, prompt])
    kept = dict(served.requests)
    for number, name in enumerate(("math", "law", "code"), 20):
        for twin in range(2):
            served.requests["other"] = LoRARequest(f"{name}{twin}", number + 10 * twin, str(adapters[name]))
            served.ask(["other"], [prompt])
    served.requests = kept
    kinds = ["averages", "gated", "twice"]
    answers, cached = served.ask(kinds, [prompt] * 3)
    assert cached == [32, 0, 32]
    for kind, answer in zip(kinds, answers, strict=True):
        check(answer, expected(models, kind, prompt))


def test_a_request_brings_its_own_selection(served: Served, models: Any) -> None:
    """One folder, one slot of vLLM, many selections in one batch: forced, off, weighted, and a shared layer of which
    the router is told who speaks."""
    choices: list[Any] = [
        {"user": "ada"}, {"user": "bob"}, {"user": ["ada"], "domain": None}, {"domain": "math", "personality": "law"},
        {"domain": {"math": 0.7, "code": -0.5}}, {"domain": None}, None, '{"user": "ada"}',
    ]  # fmt: skip
    prompt = prompt_of(40, 70)
    answers, _ = served.ask(["averages"] * 8, [prompt] * 8, choices)
    for choice, answer in zip([*choices[:6], {}, {"user": "ada"}], answers, strict=True):
        check(answer, expected(models, "averages", prompt, choice))
    assert len({round(answer.logprobs[0], 3) for answer in answers}) == 7
    answers, cached = served.ask(
        ["averages"] * 3, [prompt] * 3, [{"user": "ada"}, None, {"user": "bob", "domain": None}]
    )
    assert cached == [32, 32, 0]
    for choice, answer in zip([{"user": "ada"}, {}, {"user": "bob", "domain": None}], answers, strict=True):
        check(answer, expected(models, "averages", prompt, choice))


@pytest.mark.parametrize(
    "kind, choice, message",
    [
        ("averages", {"user": "eve"}, "no adapter 'eve'"),
        ("averages", "no json", "maps layers to choices, as JSON"),
        ("averages", ["math"], "maps layers to choices"),
        ("code", {"user": "ada"}, "no routed stack"),
        ("base", {"user": "ada"}, "no routed stack"),
    ],
)
def test_wrong_selections_are_refused_alone(served: Served, models: Any, kind: str, choice: Any, message: str) -> None:
    prompt = prompt_of(9, 71)
    with pytest.raises(VLLMValidationError, match=message):
        served.ask([kind], [prompt], [choice])
    answers, _ = served.ask(["averages"], [prompt])
    check(answers[0], expected(models, "averages", prompt))


@pytest.mark.parametrize(
    "part, changed, message",
    [
        (None, {"speculative_config": object()}, "speculative decoding"),
        (None, {"kv_transfer_config": object()}, "KV caches that are moved or offloaded"),
        ("model_config", {"enable_prompt_embeds": True}, "prompts that are embeddings"),
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline stages"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "context parallelism"),
        ("parallel_config", {"enable_dbo": True}, "micro-batches"),
    ],
)
def test_what_is_not_covered_is_refused(
    served: Served,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    part: str | None,
    changed: Any,
    message: str,
) -> None:
    """By the names that vLLM's own configuration has."""
    routing = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner.molora
    config = routing.runner.vllm_config
    found = config if part is None else getattr(config, part)
    for name, value in changed.items():
        assert hasattr(found, name)
        monkeypatch.setattr(found, name, value)
    with pytest.raises(BackendError, match=message):
        routing.open(folders["averages"])
