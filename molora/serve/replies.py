"""What the server answers, in the shapes of OpenAI's API. ``routes`` is ours: [layer, adapter or null, weight]."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Route = tuple[str, str | None, float]


class _Reply(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Usage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(_Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(_Reply):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(_Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(_Reply):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(_Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(_Reply):
    index: int
    message: AnswerMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    routes: list[list[Route]] | None = None  # by token


class ChatChunkChoice(_Reply):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class TextChoice(_Reply):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None
    routes: list[list[Route]] | None = None


class _Body(_Reply):
    id: str
    object: str
    created: int
    model: str
    usage: Usage | None = None


class Chat(_Body):
    choices: list[ChatChoice]


class ChatChunk(_Body):
    choices: list[ChatChunkChoice]
    routes: list[Route] | None = None  # of the chunk's token


class Text(_Body):
    choices: list[TextChoice]
    routes: list[Route] | None = None  # of a chunk's token


class ModelCard(_Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "molora"


class ModelList(_Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LayerCard(_Reply):
    name: str
    adapters: list[str]  # that the asker may name
    default: str | None  # what acts where nothing is said: an adapter, "auto" or nothing
    shared: bool  # one adapter for each user
    keyed: bool  # "auto" is decided for a question as a whole


class StackCard(_Reply):
    base: str
    router: bool
    layers: list[LayerCard]


class AdapterCard(_Reply):
    layer: str
    name: str
    ranks: list[int]
    parameters: int


class AdapterList(_Reply):
    object: Literal["list"] = "list"
    data: list[AdapterCard]


class Names(_Reply):
    object: Literal["list"] = "list"
    data: list[str]


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
