"""Messages of a chat, and the calls of tools in them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from serve.openai.bodies import Body
from serve.openai.errors import located
from serve.openai.fields import CALL_HARMLESS, MESSAGE_HARMLESS, MESSAGE_NEUTRAL, PART_HARMLESS
from serve.openai.tools.choice import MOST_TOOLS, NAME, NAME_ALLOWED
from serve.openai.tools.rendering import read_arguments
from serve.sampling.tool_grammar import allows_only_objects
from stu.common.errors import UNSET, UserError
from stu.common.text import Json

MOST_MESSAGES = 1024
MOST_PARTS = 8192
"""Limit of text parts in all messages of a chat together."""
MOST_CALLS = 1024
"""Limit of calls in all messages of a chat together."""


class Function(Body):
    """A function that a tool is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "Function":
        if not NAME.fullmatch(self.name):
            raise located(UserError("name", self.name, NAME_ALLOWED))
        if self.parameters and not allows_only_objects(self.parameters):
            allowed = 'a schema of objects, as arguments are one: give it "type": "object"'
            raise located(UserError("parameters", UNSET, allowed))
        return self


class Tool(Body):
    """A tool that an answer may call."""

    type: Literal["function"]
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and tool.get("type", "function") != "function":
            fix = (
                'the server has no tools of its own, and calls have JSON arguments: give "function"'
            )
            raise located(UserError("type", tool["type"], fix=fix))
        return tool


def check_arguments(arguments: str) -> None:
    """Raise pydantic's error for the field `arguments` if it is not a JSON object."""
    try:
        read_arguments(arguments)
    except (ValueError, RecursionError) as error:
        raise located(UserError("arguments", arguments, "a JSON object, as text")) from error


class CalledFunction(Body):
    """The function of a call, and its arguments."""

    name: str
    arguments: str = ""

    harmless = CALL_HARMLESS

    @model_validator(mode="after")
    def _check_arguments(self) -> "CalledFunction":
        check_arguments(self.arguments)
        return self


class ToolCall(Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    harmless = CALL_HARMLESS


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str

    harmless = PART_HARMLESS


class Message(Body):
    """A message of a chat, also as OpenAI's client returns it in an answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    harmless = MESSAGE_HARMLESS
    neutral = MESSAGE_NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, message: Any) -> Any:
        """Refuse roles and parts that other servers know, with what to do instead."""
        if not isinstance(message, dict):
            return message
        role, content = message.get("role"), message.get("content")
        if role == "function":
            fix = 'use role "tool", with the tool_call_id of the call'
            raise located(UserError("role", role, fix=fix))
        for number, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                raise located(UserError(f"content.{number}.type", kind, '"text"'))
        return message

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise located(UserError("content", None, "a string"))
        if self.tool_calls and self.role != "assistant":
            raise located(
                UserError("tool_calls", fix='only a message of role "assistant" has them')
            )
        if self.role == "tool" and self.tool_call_id is None:
            raise located(UserError("tool_call_id", None, "the id of the call that returned this"))
        if self.role != "tool" and self.tool_call_id is not None:
            fix = 'only a message of role "tool" has it'
            raise located(UserError("tool_call_id", self.tool_call_id, fix=fix))
        return self

    @property
    def text(self) -> str:
        """Content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


def num_elements(values: list[Any], name: str) -> int:
    """Return the number of elements of the lists with a name in all objects of a list together."""
    lists = [value.get(name) for value in values if isinstance(value, dict)]
    return sum(len(found) for found in lists if isinstance(found, list))


def _require_few(messages: Any) -> Any:
    """Refuse too many parts or calls before looking at any of them."""
    if not isinstance(messages, list):
        return messages
    looked_at = messages[:MOST_MESSAGES]
    for name, most, what in (
        ("content", MOST_PARTS, "parts"),
        ("tool_calls", MOST_CALLS, "tool_calls"),
    ):
        if (count := num_elements(looked_at, name)) > most:
            allowed = f"messages of at most {most} {what} together, not {count}"
            raise located(UserError("", UNSET, allowed))
    return messages


Messages = Annotated[
    list[Message],
    Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES),
    BeforeValidator(_require_few),
]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)]


def rendered(messages: list[Message]) -> list[Json]:
    """Return the messages for `serve.openai.tools.rendering`.

    Raises UserError for the result of a call that no message before it has.
    """
    values: list[Json] = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        value: Json = {"role": message.role, "content": message.text}
        if message.name:
            value["name"] = message.name
        if message.tool_calls:
            value["tool_calls"] = [
                {
                    "id": call.id,
                    "name": call.function.name,
                    "arguments": read_arguments(call.function.arguments),
                }
                for call in message.tool_calls
            ]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                fix = "no message before it has a call with this id"
                raise UserError(f"messages.{number}.tool_call_id", message.tool_call_id, fix=fix)
            value = {"name": names[message.tool_call_id], **value}
            value["tool_call_id"] = message.tool_call_id
        values.append(value)
    return values
