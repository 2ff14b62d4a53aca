"""Requests that begin alike: vLLM hands a block of the prefix cache on as soon as it is scheduled, so a request goes on
from tokens that another reads in the same step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.conftest import TOLERANCE, Served, check, expected, prompt_of

STACKS = ("averages", "gated", "twice", "deep")


@pytest.fixture(scope="module")
def roomy(base: Path, folders: dict[str, Path], adapters: dict[str, Path]) -> Served:
    """With the prefix cache, and steps in which several prompts fit."""
    return Served(base, folders, adapters, enable_prefix_caching=True)


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize(
    "lengths",
    [(40, 72), (33, 33, 33), (40, 72, 104), (70, 50, 66)],
    ids=["as many tokens", "one token", "a chain", "fewer"],
)
def test_in_the_step_in_which_it_is_read(roomy: Served, models: Any, kind: str, lengths: tuple[int, ...]) -> None:
    """Of 40 tokens and 72 that begin alike, the second has 32 from the cache, and both are 40 in the step."""
    whole = prompt_of(200, 300 + sum(lengths))
    prompts = [whole[:length] for length in lengths]
    answers, cached = roomy.ask([kind] * len(lengths), prompts)
    assert cached[0] == 0 and all(hit >= 32 for hit in cached[1:])
    for prompt, answer in zip(prompts, answers, strict=True):
        check(answer, expected(models, kind, prompt))


def test_another_version_under_the_same_name(roomy: Served, models: Any, folders: dict[str, Path]) -> None:
    """As a server has it that is told to take a new one: what the prefix cache knows is of the old one."""
    from vllm.lora.request import LoRARequest

    prompt = prompt_of(70, 320)
    for number, kind, hits in ((40, "averages", False), (41, "gated", False), (40, "averages", True)):
        roomy.requests["mine"] = LoRARequest("mine", number, str(folders[kind]))
        answers, cached = roomy.ask(["mine"], [prompt])
        assert (cached[0] >= 64) is hits
        check(answers[0], expected(models, kind, prompt))


def test_several_answers_to_one_prompt(roomy: Served, models: Any) -> None:
    """Each goes on by itself from the prompt's blocks; 33 tokens are one more than a block."""
    from vllm import SamplingParams

    prompt, choice = prompt_of(33, 321), {"user": "ada"}
    (output,) = roomy.llm.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(
            n=4, temperature=1, seed=5, max_tokens=10, logprobs=0, ignore_eos=True, detokenize=False,
            extra_args={"molora": choice},
        ),
        lora_request=roomy.requests["twice"], use_tqdm=False,
    )  # fmt: skip
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    for answer in output.outputs:
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        wanted = models["twice"](input_ids=ids, selection=choice).logits[0, 32:-1].log_softmax(-1)
        for token, found, place in zip(answer.token_ids, answer.logprobs, wanted, strict=True):
            assert abs(found[token].logprob - float(place[token])) < TOLERANCE
