"""Bodies of requests as OpenAI's clients write them, with some of vLLM's and this project's fields.

Pydantic checks types and names here; `serve.openai.completions` checks values where it builds
requests. Null means the same as leaving a field out. Fields that change nothing are listed in
`serve.openai.fields`; a field that is in neither place is refused by name, as OpenAI does.

Validation stops at the first error of a list or object. Otherwise pydantic would build an error for
each element, and a body of a million elements would take a minute and gigabytes. So every list and
dict here has `fail_fast`, and a limit where its elements become objects.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from serve.openai.bodies import Body
from serve.openai.errors import body_error, located
from serve.openai.fields import (
    CHAT_HARMLESS,
    CHAT_NEUTRAL,
    EMBEDDING_NEUTRAL,
    HARMLESS,
    TEXT_NEUTRAL,
)
from serve.openai.messages import Messages, Tools
from serve.prompts import MOST_STOP_TOKENS
from serve.request import Pooling
from stu.common.errors import UNSET, UserError

MOST_BIASES = 4096
MOST_PROMPTS = 128
MOST_INPUTS = 2048

TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MOST_STOP_TOKENS)]
LogitBias = Annotated[dict[str, float], Field(fail_fast=True, max_length=MOST_BIASES)]


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


class EngineBody(RequestBody):
    """Fields of all bodies that engines compute."""

    cache_salt: str | None = None
    """Name of a tenant: remembered prefixes are shared only among requests with the same one."""
    priority: int | None = None
    """Requests with a lower number go first; 0, the default, goes before all others."""
    truncate_prompt_tokens: int | None = None
    """Number of tokens at the end of a prompt that are used; -1: as many as there is room for."""


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
    best_of: int | None = None
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
    logit_bias: LogitBias | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Any = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    stop_at_eos: bool | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None


class CompletionBody(CompletionSettings):
    """Body of `/v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    harmless = HARMLESS
    neutral = TEXT_NEUTRAL


class ChatBody(CompletionSettings):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    harmless = CHAT_HARMLESS
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


class TextScoreBody(EngineBody):
    """Body of `/score`."""

    text_1: Input
    text_2: Input
    pooling: Pooling = "mean"
    """Hidden states that make the embeddings, as for `/v1/embeddings`."""

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
