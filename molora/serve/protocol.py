"""What clients of OpenAI's API send, and how much of it is served here; the answers are in ``replies``.

A field that is null counts as left out. One that is not served, or not known, is refused by its name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from molora.errors import RequestError
from molora.serve.requests import MOST_LOGPROBS, Sampling

MOST_CHOICES = 64  # sequences of one request
SHORT = 16  # tokens of a completion that names no length, as at OpenAI

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
ChoiceOf = str | list[str] | dict[str, float] | None


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported: send text")
        return "\n".join(part["text"] for part in content)

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Asked):
    include_usage: bool = False


class ResponseFormat(_Asked):
    type: Literal["text"]


class _Generation(_Asked):
    """What both kinds of requests have."""

    model: str = Field(max_length=512)
    selection: dict[str, ChoiceOf] = Field(default_factory=dict)  # ours: layer -> choice, over what the model says
    routes: bool = False  # ours: tell for each token which adapters acted
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float] = Field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False  # as at vLLM: the answer has the length that is asked for
    max_tokens: Count | None = None
    stop: list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(default=1, ge=1, le=8)
    user: str = Field(default="", max_length=512)

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    def _sampling(self, most: int | None, logprobs: int | None, number: int) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed + number,  # one seed, and yet different choices
            max_tokens=most,
            stop=tuple(self.stop),
            logprobs=logprobs,
        )


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None

    def sampling(self, number: int) -> Sampling:
        """Of choice ``number``.

        Raises:
            RequestError: a value is out of range.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.")
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(most, (self.top_logprobs or 0) if self.logprobs else None, number)


class CompletionRequest(_Generation):
    prompt: list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, prompt: Any) -> Any:
        """A text, several, tokens, or several lists of tokens: as several."""
        one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
        return [prompt] if one else prompt

    @model_validator(mode="after")
    def _not_too_many(self) -> "CompletionRequest":
        if not 1 <= len(self.prompt) * self.n <= MOST_CHOICES:
            raise ValueError(f"give from 1 prompt to as many as make {MOST_CHOICES} choices")
        return self

    def sampling(self, number: int) -> Sampling:
        """Of choice ``number`` of a prompt; as for chats."""
        return self._sampling(SHORT if self.max_tokens is None else self.max_tokens, self.logprobs, number)


def complaint(errors: list[Any]) -> tuple[str, str | None]:
    """The first of pydantic's errors as a sentence, and the field that it is about."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place)[:200] or None
    if first["type"] == "extra_forbidden":
        return f"{field!r} is not supported here: leave it out.", field
    if first["type"] == "missing" and field is None:
        return "Send a JSON object, as application/json.", None
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{field!r}: {message}." if field else f"The request is not valid: {message}."), field
