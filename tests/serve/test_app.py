"""What the HTTP server answers, over an engine that pretends."""

from tests.serve.asking import chat, chunks, client_of, error_of, text
from tests.serve.fake_engine import FakeEngine


def test_a_chat_is_answered_whole():
    engine = FakeEngine()
    reply = chat(client_of(engine), temperature=0, stop="x", seed=3, max_completion_tokens=40, user="u").json()
    assert reply["object"] == "chat.completion" and reply["model"] == "molora"
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None and "routes" not in choice
    [request] = engine.requests
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.model.tokenizer.decode(request.ids) == prompt
    assert request.sampling.stop == ("x",) and request.sampling.max_tokens == 40 and request.sampling.seed == 3
    count = len(request.ids)
    assert reply["usage"] == {"prompt_tokens": count, "completion_tokens": 11, "total_tokens": count + 11}


def test_a_stream_has_the_same_text_and_its_usage_at_the_end():
    found = chunks(chat(client_of(), stream=True, stream_options={"include_usage": True}))
    *told, last, used = found
    assert [chunk["choices"][0]["delta"]["content"] for chunk in told] == list("Hello there")
    assert told[0]["choices"][0]["delta"]["role"] == "assistant" and "role" not in told[1]["choices"][0]["delta"]
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert used["choices"] == [] and used["usage"]["completion_tokens"] == 11
    assert len({chunk["id"] for chunk in found}) == 1 and found[0]["object"] == "chat.completion.chunk"
    assert "usage" not in chunks(chat(client_of(), stream=True))[-1]


def test_several_choices_count_the_prompt_once_and_have_own_seeds():
    engine = FakeEngine()
    reply = chat(client_of(engine), n=3, seed=5, max_tokens=2).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert reply["usage"]["completion_tokens"] == 6
    assert reply["usage"]["prompt_tokens"] == len(engine.requests[0].ids)
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 7]
    told = chunks(chat(client_of(), n=2, stream=True))
    for number in (0, 1):
        own = [c["choices"][0]["delta"].get("content", "") for c in told if c["choices"][0]["index"] == number]
        assert "".join(own) == "Hello there"


def test_logprobs_have_openais_shape():
    choice = chat(client_of(), logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"][0]
    [token] = choice["logprobs"]["content"]
    assert token["token"] == "H" and token["logprob"] == -0.5 and token["bytes"] == [72]
    assert [one["logprob"] for one in token["top_logprobs"]] == [-0.5, -1.5]
    assert chat(client_of(), logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    found = text(client_of(), logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["H", "e"] and found["text_offset"] == [0, 1]
    assert found["token_logprobs"] == [-0.5, -0.5] and found["top_logprobs"] == [{"H": -0.5}, {"e": -0.5}]
    assert chunks(text(client_of(), logprobs=0, stream=True))[1]["choices"][0]["logprobs"]["text_offset"] == [1]


def test_a_part_of_a_character_has_no_bytes():
    content = chat(client_of(FakeEngine(script="é")), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [one["bytes"] for one in content] == [None, None]


def test_routes_are_told_by_token():
    route = [["domain", "math", 0.75], ["user", None, 0.0]]
    told = chunks(chat(client_of(), routes=True, stream=True))
    assert [chunk.get("routes") for chunk in told] == [route] * 11 + [None]
    assert chat(client_of(), routes=True, max_tokens=2).json()["choices"][0]["routes"] == [route, route]
    assert chunks(text(client_of(), routes=True, stream=True))[0]["routes"] == route


def test_completions_take_texts_and_tokens():
    engine = FakeEngine()
    reply = text(client_of(engine), prompt=["ab", "c"], n=2).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["object"] == "text_completion" and reply["choices"][0]["text"] == "Hello there"
    assert reply["usage"]["prompt_tokens"] == 3 and reply["usage"]["completion_tokens"] == 44
    assert engine.requests[0].sampling.max_tokens == 16
    text(client_of(engine), prompt=[7, 8])
    text(client_of(engine), prompt=[[7], [8]])
    assert [list(request.ids) for request in engine.requests[4:]] == [[7, 8], [7], [8]]
    told = chunks(text(client_of(), stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in told) == "Hello there"
    assert told[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_model_and_the_extra_field_select():
    engine = FakeEngine()
    chat(client_of(engine), model="base+sage+user/ada", selection={"domain": ["math", "code"], "user": None})
    assert engine.requests[0].selection == {"personality": "sage", "domain": ["math", "code"], "user": None}


def test_text_parts_developers_and_nulls():
    engine = FakeEngine()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": None}]
    assert chat(client_of(engine), messages=messages, tools=None, response_format={"type": "text"}).status_code == 200
    said = engine.model.tokenizer.decode(engine.requests[0].ids)
    assert "system\nBe brief." in said and "user\na\nb" in said


def test_models_are_listed_and_found():
    client = client_of()
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert names[:2] == ["molora", "base"] and "base+domain/math" in names and not any("user" in n for n in names)
    assert client.get("/v1/models/base+domain/math").json()["id"] == "base+domain/math"
    assert error_of(client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}


def test_the_stack_tells_what_a_selection_may_name():
    told = client_of().get("/v1/stack").json()
    assert told["base"] == "org/small" and told["router"] is True
    assert [layer["name"] for layer in told["layers"]] == ["personality", "domain", "user"]
    assert told["layers"][0] == {
        "name": "personality", "adapters": ["sage", "pirate"], "default": "sage", "shared": False, "keyed": False,
    }  # fmt: skip
    assert told["layers"][1]["default"] == "auto"
    assert told["layers"][2] == {"name": "user", "adapters": [], "default": None, "shared": True, "keyed": False}


def test_metrics_count_by_route_and_status():
    client = client_of()
    chat(client)
    chat(client, n=0)
    client.get("/v1/models/base")
    client.get("/nowhere/at/all")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'molora_http_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'molora_http_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        'molora_http_requests_total{endpoint="/v1/models/{name:path}",status="200"} 1.0',
        'molora_http_requests_total{endpoint="other",status="404"} 1.0',
        "molora_generated_tokens_total 11.0",
        "molora_rows 8.0",
        "molora_time_to_first_token_seconds_count 1.0",
        "molora_time_per_token_seconds_count 10.0",
    ):
        assert line in lines
