"""Items of a conversation in OpenAI's responses: messages, calls of tools, and their results."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from serve.openai.bodies import Body
from serve.openai.errors import body_error
from serve.openai.fields import CALL_HARMLESS, PART_HARMLESS
from serve.openai.messages import MOST_MESSAGES, MOST_PARTS, check_arguments, num_elements
from stu.common.errors import UNSET, UserError
from stu.common.text import Json

ITEM_HARMLESS: Mapping[str, type] = {"id": str, "status": str, "phase": str, **CALL_HARMLESS}
"""Fields of items in answers, which repeat what the others say."""
RESULT_HARMLESS = {**ITEM_HARMLESS, "name": str}
OUTPUT_PART_HARMLESS = {**PART_HARMLESS, "logprobs": list, "parsed": object}
TEXT_PARTS = ("input_text", "output_text", "text")


class Part(Body):
    """A text part of an item."""

    type: Literal["input_text", "output_text", "text"]
    text: str

    harmless = OUTPUT_PART_HARMLESS


Content = str | Annotated[list[Part], Field(fail_fast=True)]


class Item(Body):
    """An item of a conversation."""

    harmless = ITEM_HARMLESS
    prefix: ClassVar[str]
    """Beginning of the ids of such items."""

    @abstractmethod
    def written(self, item_id: str) -> Json:
        """Return the item as the server lists it."""

    @abstractmethod
    def add_to(self, messages: list[Json]) -> None:
        """Append what the item says to the messages of a chat."""


class MessageItem(Item):
    """A message."""

    prefix = "msg"

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def written(self, item_id: str) -> Json:
        """See `Item.written`."""
        part: Json = {"type": "input_text", "text": _text(self.content)}
        if self.role == "assistant":
            part = {**part, "type": "output_text", "annotations": []}
        values = {"id": item_id, "type": "message", "role": self.role, "content": [part]}
        return {**values, "status": "completed"}

    def add_to(self, messages: list[Json]) -> None:
        """See `Item.add_to`."""
        messages.append({"role": self.role, "content": _text(self.content)})


class CallItem(Item):
    """A call of a tool."""

    prefix = "fc"

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    @model_validator(mode="after")
    def _check_arguments(self) -> "CallItem":
        check_arguments(self.arguments)
        return self

    def written(self, item_id: str) -> Json:
        """See `Item.written`."""
        return {"id": item_id, **self.model_dump(), "status": "completed"}

    def add_to(self, messages: list[Json]) -> None:
        """See `Item.add_to`. Calls of one answer belong to one message."""
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)


class ResultItem(Item):
    """The result of a call."""

    prefix = "fco"
    harmless = RESULT_HARMLESS

    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def written(self, item_id: str) -> Json:
        """See `Item.written`."""
        values = {"id": item_id, "type": self.type, "call_id": self.call_id}
        return {**values, "output": _text(self.output), "status": "completed"}

    def add_to(self, messages: list[Json]) -> None:
        """See `Item.add_to`."""
        content = _text(self.output)
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": content})


KINDS: Mapping[str, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": ResultItem,
}
INSTEAD = {
    "item_reference": "give the item itself, or previous_response_id",
    "reasoning": "the model has no separate reasoning, leave it out",
}


def read_items(values: Any) -> list[Item]:
    """Return the items of an input, which may be one text.

    Raises UserError with the place in the input.
    """
    if isinstance(values, str):
        return [MessageItem(role="user", content=values)]
    if not isinstance(values, list) or not values:
        raise UserError("", UNSET, "a text, or a list of at least one item")
    if len(values) > MOST_MESSAGES:
        allowed = f"a list of at most {MOST_MESSAGES} items, not {len(values)}"
        raise UserError("", UNSET, allowed)
    count = sum(num_elements(values, name) for name in ("content", "output"))
    if count > MOST_PARTS:
        allowed = f"items of at most {MOST_PARTS} parts together, not {count}"
        raise UserError("", UNSET, allowed)
    return [_read_item(index, value) for index, value in enumerate(values)]


def messages_of(items: Sequence[Item], instructions: str | None) -> list[Json]:
    """Return the messages of a chat that items make, after a system message of instructions."""
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        item.add_to(messages)
    return messages


def _read_item(index: int, value: Any) -> Item:
    if isinstance(value, Item):
        return value
    kind = value.get("type") or "message" if isinstance(value, dict) else "message"
    if not isinstance(kind, str) or kind not in KINDS:
        fix = INSTEAD.get(str(kind)[:50], f"the model reads only {', '.join(KINDS)}")
        raise UserError(f"{index}.type", kind, fix=fix)
    _refuse_parts(index, value)
    try:
        return KINDS[kind].model_validate(value)
    except ValidationError as error:
        wrong = body_error(error.errors(include_url=False))
        field = f"{index}.{wrong.field}" if wrong.field else str(index)
        raise wrong.renamed(field) from error


def _refuse_parts(index: int, value: Any) -> None:
    """Refuse images, files and refusals by name."""
    name = "output" if isinstance(value, dict) and "output" in value else "content"
    parts = value.get(name) if isinstance(value, dict) else None
    for number, part in enumerate(parts if isinstance(parts, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in TEXT_PARTS:
            fix = "the model reads only text: put it into a part of type input_text"
            raise UserError(f"{index}.{name}.{number}.type", kind, fix=fix)


def _text(content: str | Sequence[Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
