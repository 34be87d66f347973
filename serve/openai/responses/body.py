"""Bodies of `/v1/responses`, and the chats that they ask for."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from serve.openai.bodies import Body
from serve.openai.errors import body_error, located
from serve.openai.fields import HARMLESS, NEUTRAL, Neutral
from serve.openai.responses.items import Item, messages_of, read_items
from serve.openai.schemas import ChatBody, LogitBias, RequestBody, StopTokenIds, Texts
from serve.openai.tools.choice import MOST_TOOLS, WORDS
from stu.common.errors import UNSET, UserError
from stu.common.text import Json

LOGPROBS = "message.output_text.logprobs"
INCLUDED = {
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
}
"""Values of `include`. All but the first are parts of items that no answer has."""
PASSED_ON = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "seed", "top_k", "min_p", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "cache_salt"),
    *("chat_template_kwargs", "stop_token_ids"),
)
"""Fields with the same name and meaning in a chat."""
FUNCTION = '{"type": "function", "name": ".."}'
ALLOWED = f'{{"type": "allowed_tools", "mode": "auto", "tools": [{FUNCTION}]}}'
"""Forms of `tool_choice`."""
MOST_METADATA, MOST_KEY, MOST_VALUE = 16, 64, 512

_NO_BACKGROUND = "answers are not written in the background: leave it out, or use stu-generate"
RESPONSE_HARMLESS = {
    name: HARMLESS[name]
    for name in (
        *("user", "safety_identifier", "service_tier", "prompt_cache_key", "session_id"),
        *("prompt_cache_retention", "prompt_cache_options"),
    )
} | {"max_tool_calls": int}
TOOL_HARMLESS: Mapping[str, type] = {"defer_loading": bool}
RESPONSE_NEUTRAL: Neutral = {
    "background": ((False,), _NO_BACKGROUND),
    "background_options": (({},), _NO_BACKGROUND),
    "conversation": ((), "use previous_response_id"),
    "context_management": (([],), "nothing is compacted, leave it out"),
    "prompt": ((), "prompts have no stored templates: use instructions and input"),
    "truncation": (("disabled",), "shorten the input yourself"),
    "moderation": NEUTRAL["moderation"],
    "image": ((), "the model reads only text, leave it out"),
    "access_programs": ((), "leave it out"),
}


class Text(Body):
    """Settings of an answer's text."""

    format: dict[str, Any] | None = None

    neutral: ClassVar[Neutral] = {"verbosity": NEUTRAL["verbosity"]}


class Reasoning(Body):
    """Settings of reasoning, which there is none of."""

    harmless: ClassVar[Mapping[str, type]] = {"summary": str, "generate_summary": str}
    neutral: ClassVar[Neutral] = {"effort": NEUTRAL["reasoning_effort"]}


class ResponseStreamOptions(Body):
    """Options of a stream."""

    include_obfuscation: bool | None = None
    """Pad pieces, so that an eavesdropper cannot tell the lengths of tokens."""


class FunctionTool(Body):
    """A tool that an answer may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    harmless = TOOL_HARMLESS


def _refuse_built_in(tools: Any) -> Any:
    """Refuse tools of OpenAI's by name."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
        if kind != "function":
            fix = 'the server has no tools of its own: give tools of type "function"'
            raise located(UserError(f"{index}.type", kind, fix=fix))
    return tools


def _read_input(values: Any) -> list[Item]:
    try:
        return read_items(values)
    except UserError as error:
        raise located(error) from error


def _require_small(metadata: Any) -> Any:
    if isinstance(metadata, dict) and (
        len(metadata) > MOST_METADATA
        or any(
            not isinstance(value, str) or len(value) > MOST_VALUE or len(key) > MOST_KEY
            for key, value in metadata.items()
        )
    ):
        allowed = (
            f"at most {MOST_METADATA} texts of {MOST_VALUE} characters, with names of {MOST_KEY}"
        )
        raise located(UserError("", UNSET, allowed))
    return metadata


class ResponseBody(RequestBody):
    """Body of `/v1/responses`."""

    input: Annotated[Any, BeforeValidator(_read_input)]
    """A text, or a list of items; after validation, always items."""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: Texts | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    tools: (
        Annotated[
            list[FunctionTool],
            Field(fail_fast=True, max_length=MOST_TOOLS),
            BeforeValidator(_refuse_built_in),
        ]
        | None
    ) = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[
        Annotated[dict[str, str], Field(fail_fast=True)] | None, BeforeValidator(_require_small)
    ] = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | Texts | None = None
    stop_token_ids: StopTokenIds | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    harmless = RESPONSE_HARMLESS
    neutral = RESPONSE_NEUTRAL

    @property
    def items(self) -> list[Item]:
        """Items of the input."""
        found: list[Item] = self.input
        return found

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer has log probabilities."""
        return LOGPROBS in (self.include or ())


def chat_of(body: ResponseBody) -> ChatBody:
    """Return the chat that a body asks for. Raises UserError with the names of a chat's fields, as
    `serve.openai.responses.endpoint` expects."""
    _check(body)
    values: Json = {name: getattr(body, name) for name in PASSED_ON}
    values |= {
        "messages": messages_of(body.items, body.instructions),
        "max_completion_tokens": body.max_output_tokens,
        "response_format": response_format(body.text.format if body.text else None),
        "tools": [_chat_tool(tool) for tool in body.tools or ()],
        "tool_choice": chat_choice(body.tool_choice),
    }
    if body.has_logprobs:
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    try:
        return ChatBody.model_validate(values)
    except ValidationError as error:
        raise body_error(error.errors(include_url=False)) from error


def response_format(text_format: Mapping[str, Any] | None) -> Json | None:
    """Return the `response_format` of a chat for a `text.format`."""
    if text_format is None:
        return None
    kind = text_format.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise UserError("text.format.type", kind, "one of text, json_object, json_schema")
    rest = {name: value for name, value in text_format.items() if name != "type"}
    rest = {name: value for name, value in rest.items() if value is not None}
    return {"type": kind, "json_schema": rest} if kind == "json_schema" else {"type": kind, **rest}


def chat_choice(choice: str | Mapping[str, Any] | None) -> str | Json | None:
    """Return the `tool_choice` of a chat for that of a response. Raises UserError for one that has
    not the form of a response's."""
    if isinstance(choice, str) and choice not in WORDS:
        raise UserError("tool_choice", choice, f"{', '.join(WORDS)}, {FUNCTION}, or {ALLOWED}")
    if choice is None or isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return _chat_function(choice, "tool_choice", FUNCTION)
    if kind != "allowed_tools":
        raise UserError("tool_choice.type", kind, "function or allowed_tools")
    mode, entries = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required") or not isinstance(entries, list) or not entries:
        raise UserError("tool_choice", UNSET, f"like {ALLOWED}")
    tools = [
        _chat_function(entry, f"tool_choice.tools.{index}", FUNCTION)
        for index, entry in enumerate(entries)
    ]
    return {"type": kind, kind: {"mode": mode, "tools": tools}}


def _chat_function(entry: Any, place: str, form: str) -> Json:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or entry.get("type") != "function":
        raise UserError(place, UNSET, f"like {form}")
    return {"type": "function", "function": {"name": name}}


def _check(body: ResponseBody) -> None:
    """Check the values that a chat does not have."""
    for name in body.include or ():
        if name not in INCLUDED:
            raise UserError("include", name, f"of {', '.join(sorted(INCLUDED))}")
    if body.top_logprobs and not body.has_logprobs:
        raise UserError("top_logprobs", body.top_logprobs, f'used with include=["{LOGPROBS}"]')
    if body.has_logprobs and body.tools:
        fix = "with tools there are no log probabilities: use /v1/chat/completions"
        raise UserError("include", LOGPROBS, fix=fix)
    if body.stream_options is not None and not body.stream:
        raise UserError("stream_options", fix="it needs stream=true, leave it out")


def _chat_tool(tool: FunctionTool) -> Json:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}
