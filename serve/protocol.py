"""The bodies of requests, as OpenAI's clients write them, with this project's settings beside.

What pydantic checks here are types and names; what values are allowed is decided where requests are
built (`serve.completions`). A field that is not known is refused, as OpenAI does.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0)]
Prompt = str | list[TokenId] | list[str] | list[list[TokenId]]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """What goes with a stream."""

    include_usage: bool | None = None
    """End with a piece that counts tokens."""


class _Sampling(_Body):
    """Settings of both kinds of completions; null is as good as leaving one out."""

    model: str | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    stop_at_eos: bool | None = None
    user: str | None = None


class CompletionBody(_Sampling):
    """`/v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its parts, joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(_Sampling):
    """`/v1/chat/completions`. A chat template in a request is refused, as any other field."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(_Body):
    """`/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    """Put BOS first, as a completion does."""


class DetokenizeBody(_Body):
    """`/detokenize`."""

    tokens: list[TokenId]
    model: str | None = None


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
    """OpenAI's body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
