"""The bodies of requests, as OpenAI's clients write them, with this project's settings beside.

What pydantic checks here are types and names; what values are allowed is decided where requests are
built (`serve.openai.completions`). Null is as good as leaving a field out. Fields that decide
nothing are those of `serve.openai.fields`; one that is in neither place is refused by
name, as OpenAI does.

Validation stops at the first error of a list or dict. Without that, pydantic builds an error for
each element, and a body of a million of them takes a minute and gigabytes. So every list and dict
here has `fail_fast`, and a limit where its elements become objects.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve.openai.completions import MOST_PROMPTS
from serve.openai.fields import (
    CHAT_NEUTRAL,
    HARMLESS,
    MESSAGE_HARMLESS,
    MESSAGE_NEUTRAL,
    PART_HARMLESS,
    TEXT_NEUTRAL,
    Neutral,
    without_inert,
)
from serve.prompts import MOST_STOP_TOKENS
from stu.common.errors import show

MOST_BIASES = 4096
MOST_MESSAGES = 1024
MOST_PARTS = 8192
"""Parts of all messages of a chat."""
MOST_ERROR_CHARS = 1000
"""Length of an error's message, which may quote what a client has sent."""

TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _few_prompts(prompt: Any) -> Any:
    """Refuse too many prompts before one of them is looked at."""
    if isinstance(prompt, list) and len(prompt) > MOST_PROMPTS and type(prompt[0]) is not int:
        raise PydanticCustomError(
            "too_many_prompts",
            "it has {count} elements, and may be a list of token ids or of {most} prompts at most",
            {"count": len(prompt), "most": MOST_PROMPTS},
        )
    return prompt


Prompt = Annotated[
    str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)],
    BeforeValidator(_few_prompts),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    harmless: ClassVar[Mapping[str, type]] = {}
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, given: Any) -> Any:
        """Leave nulls out, and fields that decide nothing. Leave one unknown field to be refused by
        its name, or each would be an error."""
        if not isinstance(given, dict):
            return given
        given = without_inert(given, cls.harmless, cls.neutral)
        known = cls.model_fields
        unknown = next((name for name in given if name not in known), None)
        if unknown is None:
            return given
        return {key: value for key, value in given.items() if key in known or key == unknown}


class StreamOptions(_Body):
    """What goes with a stream."""

    include_usage: bool | None = None
    """End with a piece that counts tokens."""
    continuous_usage_stats: bool | None = None
    """Count the tokens up to there in every piece, if include_usage is on."""
    include_obfuscation: bool | None = None
    """Pad pieces, so that their lengths do not show those of tokens to a listener."""


class _Sampling(_Body):
    """Settings of both kinds of completions."""

    model: str | None = None
    n: int | None = None
    stop: str | Texts | None = None
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
    logit_bias: (
        Annotated[dict[str, float], Field(fail_fast=True, max_length=MOST_BIASES)] | None
    ) = None
    response_format: dict[str, Any] | None = None
    stop_at_eos: bool | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MOST_STOP_TOKENS)] | None
    ) = None
    min_tokens: int | None = None


class CompletionBody(_Sampling):
    """`/v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    harmless = HARMLESS
    neutral = TEXT_NEUTRAL


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str

    harmless = PART_HARMLESS


class Message(_Body):
    """A turn of a chat, also as OpenAI's client returns it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    harmless = MESSAGE_HARMLESS
    neutral = MESSAGE_NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _is_read(cls, given: Any) -> Any:
        """Refuse what is known to be sent, and not read here, with what to do."""
        role, content = (
            (given.get("role"), given.get("content")) if isinstance(given, dict) else ("", "")
        )
        if role in ("tool", "function"):
            raise ValueError(
                f'role="{role}" is not served here: the model calls no tools: put what they answer '
                "into a message of role user"
            )
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind != "text":
                raise ValueError(
                    f"type={show(kind)} is not served here: parts of content must be of type text"
                )
        return given

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing: give a string")
        return self

    @property
    def text(self) -> str:
        """Its parts, joined."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


def _few_parts(messages: Any) -> Any:
    """Refuse too many parts before one of them is looked at."""
    if isinstance(messages, list) and len(messages) <= MOST_MESSAGES:
        contents = [turn.get("content") for turn in messages if isinstance(turn, dict)]
        count = sum(len(content) for content in contents if isinstance(content, list))
        if count > MOST_PARTS:
            raise PydanticCustomError(
                "too_many_parts",
                "they have {count} parts, and may have {most} at most",
                {"count": count, "most": MOST_PARTS},
            )
    return messages


class ChatBody(_Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[
        list[Message],
        Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES),
        BeforeValidator(_few_parts),
    ]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    harmless = HARMLESS
    neutral = CHAT_NEUTRAL


class TokenizeBody(_Body):
    """`/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    """Put BOS first, as a completion does."""


class DetokenizeBody(_Body):
    """`/detokenize`."""

    tokens: TokenIds
    model: str | None = None


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
    """OpenAI's body of an error, which repeats no long part of a request."""
    message, param = _shortened(message), param and _shortened(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _shortened(text: str) -> str:
    if len(text) <= MOST_ERROR_CHARS:
        return text
    half = MOST_ERROR_CHARS // 2
    return f"{text[:half]} [..] {text[-half:]}"
