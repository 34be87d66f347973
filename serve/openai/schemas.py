"""Bodies of requests as OpenAI's clients write them, with some of vLLM's and this project's fields.

Pydantic checks types and names here; `serve.openai.completions` checks values where it builds
requests. Null means the same as leaving a field out. Fields that change nothing are listed in
`serve.openai.fields`; a field that is in neither place is refused by name, as OpenAI does.

Validation stops at the first error of a list or object. Otherwise pydantic would build an error for
each element, and a body of a million elements would take a minute and gigabytes. So every list and
dict here has `fail_fast`, and a limit where its elements become objects.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from serve.openai.errors import body_error, located
from serve.openai.fields import (
    CHAT_NEUTRAL,
    EMBEDDING_NEUTRAL,
    HARMLESS,
    MESSAGE_HARMLESS,
    MESSAGE_NEUTRAL,
    PART_HARMLESS,
    TEXT_NEUTRAL,
    Neutral,
    without_inert,
)
from serve.prompts import MOST_STOP_TOKENS
from serve.request import Pooling
from stu.common.errors import UNSET, UserError

MOST_BIASES = 4096
MOST_MESSAGES = 1024
MOST_PARTS = 8192
"""Limit of text parts in all messages of a chat together."""
MOST_PROMPTS = 128
MOST_INPUTS = 2048

TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _require_few(kind: str, most: int) -> BeforeValidator:
    """Refuse too many prompts before looking at any of them."""

    def require(prompts: Any) -> Any:
        if isinstance(prompts, list) and len(prompts) > most and type(prompts[0]) is not int:
            allowed = f"one {kind}, or a list of at most {most} {kind}s, not {len(prompts)}"
            raise located(UserError("", UNSET, allowed))
        return prompts

    return BeforeValidator(require)


OneOrSeveral = str | TokenIds | Annotated[list[str | TokenIds], Field(fail_fast=True)]
Prompt = Annotated[OneOrSeveral, _require_few("prompt", MOST_PROMPTS)]
Input = Annotated[OneOrSeveral, _require_few("input", MOST_INPUTS)]


class Body(BaseModel):
    """An object in the body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    harmless: ClassVar[Mapping[str, type]] = {}
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        """Leave out nulls and fields that change nothing, and refuse the first unknown field."""
        if not isinstance(values, dict):
            return values
        try:
            values = without_inert(values, cls.harmless, cls.neutral)
            for name in values:
                if name not in cls.model_fields:
                    raise _unknown(name, list(cls.model_fields))
        except UserError as error:
            raise located(error) from error
        return values


class RequestBody(Body):
    """Body of a request, which may name the model."""

    model: str | None = None


AnyBody = TypeVar("AnyBody", bound=RequestBody)


def read_body(kind: type[AnyBody], values: Any) -> AnyBody:
    """Return a body of a kind from JSON values. Raises UserError for the first wrong field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise body_error(error.errors(include_url=False)) from error


def _unknown(name: str, known: list[str]) -> UserError:
    similar = difflib.get_close_matches(name[:100], known, n=1)
    fix = f"did you mean {json.dumps(similar[0])}?" if similar else "leave it out"
    return UserError(name, fix=f"there is no such field, {fix}")


class EngineBody(RequestBody):
    """Fields of all bodies that engines compute."""

    cache_salt: str | None = None
    """Name of a tenant: remembered prefixes are shared only among requests with the same one."""
    priority: int | None = None
    """Requests with a lower number go first; 0, the default, goes before all others."""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send the numbers of tokens in a last piece."""
    continuous_usage_stats: bool | None = None
    """Send the numbers of tokens so far in every piece, if include_usage is on."""
    include_obfuscation: bool | None = None
    """Pad pieces, so that an eavesdropper cannot tell the lengths of tokens."""


class CompletionSettings(EngineBody):
    """Fields of both text and chat completions."""

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


class CompletionBody(CompletionSettings):
    """Body of `/v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    harmless = HARMLESS
    neutral = TEXT_NEUTRAL


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str

    harmless = PART_HARMLESS


class Message(Body):
    """A message of a chat, also as OpenAI's client returns it in an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    harmless = MESSAGE_HARMLESS
    neutral = MESSAGE_NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, message: Any) -> Any:
        """Refuse roles and parts that other servers know, with what to do instead."""
        if not isinstance(message, dict):
            return message
        role, content = message.get("role"), message.get("content")
        if role in ("tool", "function"):
            fix = 'the model calls no tools, put their answers into a message of role "user"'
            raise located(UserError("role", role, fix=fix))
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise located(UserError("content.type", kind, '"text"'))
        return message

    @model_validator(mode="after")
    def _require_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise located(UserError("content", None, "a string"))
        return self

    @property
    def text(self) -> str:
        """Content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


def _require_few_parts(messages: Any) -> Any:
    """Refuse too many parts before looking at any of them."""
    if isinstance(messages, list) and len(messages) <= MOST_MESSAGES:
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        count = sum(len(content) for content in contents if isinstance(content, list))
        if count > MOST_PARTS:
            allowed = f"messages of at most {MOST_PARTS} parts together, not {count}"
            raise located(UserError("", UNSET, allowed))
    return messages


class ChatBody(CompletionSettings):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[
        list[Message],
        Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES),
        BeforeValidator(_require_few_parts),
    ]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    harmless = HARMLESS
    neutral = CHAT_NEUTRAL


class EmbeddingBody(EngineBody):
    """Body of `/v1/embeddings`."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Pooling = "mean"
    """Hidden states that make the embedding: the mean over all positions, or the last one."""
    normalize: bool = True
    """Scale embeddings to length 1."""

    harmless = HARMLESS
    neutral = EMBEDDING_NEUTRAL


class TokenizeBody(RequestBody):
    """Body of `/tokenize`."""

    prompt: str
    add_special_tokens: bool = True
    """Put BOS first, as for a completion."""


class DetokenizeBody(RequestBody):
    """Body of `/detokenize`."""

    tokens: TokenIds
