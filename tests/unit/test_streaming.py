"""Tokens as they come, each with its text and its route."""

import copy
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria

from molora import MoLoRAModel, StreamedToken
from molora.errors import MoLoRAError, SelectionError
from molora.streaming import TextDecoder, Worker
from tests.unit.spoken import make_spoken, say

TEXT = "héllo 🙂 wörld\n\n  two spaces\n日本語\nend"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    return make_spoken(tmp_path_factory.mktemp("spoken"))


def tokens_of(model: MoLoRAModel, text: str) -> list[int]:
    return model.tokenizer(text)["input_ids"]


def generate(model: MoLoRAModel, prompt: torch.Tensor, **options: Any) -> list[int]:
    return model.generate(**model.encode(prompt), **options)[0, prompt.shape[1] :].tolist()


@pytest.fixture
def prompt(model: MoLoRAModel) -> torch.Tensor:
    return model.encode("Once upon a time")["input_ids"]


def test_the_stream_is_the_generation(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    for selection in ({"domain": "auto"}, {"domain": "math"}, {"domain": None}):
        options: dict[str, Any] = {"selection": selection, "max_new_tokens": 20, "do_sample": False}
        streamed = list(model.stream(prompt, **options))
        assert all(isinstance(token, StreamedToken) for token in streamed)
        assert [token.token_id for token in streamed] == generate(model, prompt, **options)


def test_the_text_is_the_decoded_generation(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    options = say(model, prompt, tokens_of(model, TEXT))
    streamed = list(model.stream(prompt, **options))
    assert "".join(token.text for token in streamed) == TEXT
    assert model.tokenizer.decode([token.token_id for token in streamed]) == TEXT
    assert all("\ufffd" not in token.text for token in streamed)
    assert streamed[1].text == "" and streamed[2].text == "é"


def test_special_tokens_have_no_text(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    streamed = list(model.stream(prompt, **say(model, prompt, [*tokens_of(model, "ab"), end])))
    assert [token.text for token in streamed] == ["a", "b", ""]


def test_a_character_that_never_ends_is_not_lost(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    tokens = tokens_of(model, "ab🙂")[:-1]
    streamed = list(model.stream(prompt, **say(model, prompt, tokens)))
    assert "".join(token.text for token in streamed) == model.tokenizer.decode(tokens)


def test_a_decoder_that_strips_the_first_space() -> None:
    """SentencePiece decoders drop the space before the first word, and only there."""
    words = ["<unk>", "▁one", "▁two", "\n", "▁three"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    decoder = TextDecoder(fast)
    ids = [1, 2, 3, 4, 1, 3, 3, 2]
    assert "".join(decoder.push(token) for token in ids) == fast.decode(ids)


def test_messages_are_rendered(model: MoLoRAModel) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = model.encode(messages)["input_ids"]
    text = model.tokenizer.decode(ids[0])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    found = [token.token_id for token in model.stream(messages, max_new_tokens=5, do_sample=False)]
    assert found == generate(model, ids, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "prompt lookup"])
def test_routes_are_those_of_the_whole_text(more: Any, model: MoLoRAModel) -> None:
    """The route of a token is that of the place which it was predicted from."""
    prompt = model.encode("abcabcabcabc abcabc")["input_ids"]
    tokens = tokens_of(model, "abcabcabcabcdefg") if more else tokens_of(model, TEXT)
    options = {**say(model, prompt, tokens), **more} if not more else {"max_new_tokens": 24, "do_sample": False, **more}
    streamed = list(model.stream(prompt, selection={"domain": "auto"}, **options))
    text = torch.cat([prompt, torch.tensor([[token.token_id for token in streamed]])], 1)
    with torch.no_grad():
        routes = model(text, selection={"domain": "auto"}, output_routes=True).routes
    expected = [routes.at(0, prompt.shape[1] - 1 + n) for n in range(len(streamed))]
    assert len({token.route[0][1] for token in streamed}) >= 2
    assert [token.route for token in streamed] == expected
    assert [layer for layer, _, _ in streamed[0].route] == ["domain", "user"]


def test_closing_stops_it(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    count = Count()
    stream = model.stream(prompt, max_new_tokens=200, do_sample=False, stopping_criteria=[count])
    first = [next(stream).token_id for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    assert 3 <= count.steps < 200
    steps = count.steps
    assert model.routing.lock.acquire(timeout=1)
    model.routing.lock.release()
    assert generate(model, prompt, max_new_tokens=3, do_sample=False) == first
    assert count.steps == steps


def test_one_thread_serves_a_model_and_ends_with_it(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    model = make_spoken(tmp_path)
    prompt = model.encode("Once upon a time")["input_ids"]
    first = list(model.stream(prompt, max_new_tokens=4, do_sample=False))
    [thread] = set(threading.enumerate()) - before
    unfinished = model.stream(prompt, max_new_tokens=9, do_sample=False)
    next(unfinished)
    assert list(model.stream(prompt, max_new_tokens=4, do_sample=False)) == first
    assert set(threading.enumerate()) - before == {thread}
    del model, unfinished
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_copy_has_a_thread_of_its_own(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    expected = list(model.stream(prompt, max_new_tokens=4, do_sample=False))
    before = set(threading.enumerate())
    other = copy.deepcopy(model)
    assert list(other.stream(prompt, max_new_tokens=4, do_sample=False)) == expected
    assert len(set(threading.enumerate()) - before) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    worker, did = Worker(), []
    assert worker.start(lambda: did.append(1)).wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0 if worker.start(lambda: None).wait(30) else 1)
    assert os.waitpid(child, 0)[1] == 0 and did == [1]


class Count(StoppingCriteria):
    def __init__(self, fail_at: int | None = None) -> None:
        self.steps = 0
        self.fail_at = fail_at

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("out of memory")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def test_closing_at_once_runs_nothing(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    count = Count()
    stream = model.stream(prompt, max_new_tokens=200, stopping_criteria=[count])
    stream.close()  # type: ignore[attr-defined]
    assert count.steps == 0


def test_the_users_criteria_still_count(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    count = Count()
    assert len(list(model.stream(prompt, max_new_tokens=5, do_sample=False, stopping_criteria=[count]))) == 5
    assert count.steps == 5


def test_an_error_inside_reaches_the_reader(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    stream = model.stream(prompt, max_new_tokens=9, do_sample=False, stopping_criteria=[Count(fail_at=3)])
    got = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for token in stream:
            got.append(token)
    assert 2 <= len(got) <= 3
    with pytest.raises(ValueError, match="nonsense"):
        next(model.stream(prompt, nonsense=3))
    assert len(list(model.stream(prompt, max_new_tokens=2))) == 2


def test_a_bad_selection_is_refused_at_once(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    with pytest.raises(SelectionError, match="no adapter 'law'"):
        model.stream(prompt, selection={"domain": "law"})


def test_one_prompt_at_a_time(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    with pytest.raises(MoLoRAError):
        list(model.stream(prompt.repeat(2, 1), max_new_tokens=2))


def test_the_users_length_wins(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(list(model.stream(prompt, generation_config=config))) == 5
    assert len(list(model.stream(prompt, max_length=prompt.shape[1] + 4, do_sample=False))) == 4


def test_it_may_be_used_within_a_stream(model: MoLoRAModel, prompt: torch.Tensor) -> None:
    """A reader that calls the model waits for the generation, and neither disturbs the other."""
    expected = generate(model, prompt, max_new_tokens=12, do_sample=False)
    found = []
    for token in model.stream(prompt, max_new_tokens=12, do_sample=False):
        with torch.no_grad():
            model(prompt, selection={"domain": "math"})
        found.append(token.token_id)
    assert found == expected


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    model.tokenizer = None
    for prompt in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(MoLoRAError, match="no tokenizer"):
            model.stream(prompt)
    ids = torch.arange(10, 20).view(1, -1)
    assert [token.token_id for token in model.stream(ids, max_new_tokens=4, do_sample=False)] == generate(
        model, ids, max_new_tokens=4, do_sample=False
    )
