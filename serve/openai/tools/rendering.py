"""Messages with calls of tools for a chat template, whether or not it knows tools.

For a template that does not know them, a system message describes the tools, calls are text of the
assistant, and what tools return are messages of the user.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.sampling.tool_grammar import BEFORE_ARGUMENTS, BEFORE_NAME, BEGIN, END
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError
from stu.common.text import Json

RETURNED, RETURNED_END = "<tool_response>\n", "\n</tool_response>"
EXAMPLE = f'{BEGIN}{BEFORE_NAME}NAME{BEFORE_ARGUMENTS}{{"PARAMETER": VALUE}}{END}'
PROBE = "f"
PROBE_CALL = {"id": "call_0", "name": PROBE, "arguments": {"a": 1}}
OTHER_FORM = (
    "the model's chat template writes calls in another form than "
    f'{BEGIN}{{"name": .., "arguments": {{..}}}}</tool_call>, and answers with calls would not be '
    "understood: leave tools out, or change the template"
)


class ToolPrompts:
    """Prompts of one chat template.

    A message has `role` and `content`, and may have `name`, `tool_calls`, a list of `{"id", "name",
    "arguments"}`, and, if its role is tool, `tool_call_id`.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._can_write_calls: bool | None = None

    def tokens(
        self,
        messages: Sequence[Json],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Json] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            messages: The conversation.
            variables: More variables of the template.
            tools: Tools that the prompt describes, as OpenAI's objects.

        Raises:
            UserError: The template refuses the messages, or writes calls in another form.
        """
        has_calls = any("tool_calls" in message for message in messages)
        if not tools and not has_calls:
            return self._template.tokens(messages, variables)
        if not self._template.knows_tools:
            return self._template.tokens(_plain(messages, tools), variables)
        if tools and not self._writes_calls():
            raise UserError("tools", fix=OTHER_FORM)
        return self._template.tokens([_openai(message) for message in messages], variables, tools)

    def _writes_calls(self) -> bool:
        """Return whether the template writes calls in the form that answers have."""
        if self._can_write_calls is None:
            messages = [
                {"role": "user", "content": "x"},
                _openai({"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}),
            ]
            try:
                text = self._template.text(messages)
            except UserError:
                text = ""
            written = f"{BEGIN}{BEFORE_NAME}{PROBE}{BEFORE_ARGUMENTS}" + '{"a": 1}' + END
            self._can_write_calls = written in text and not self._template.has_control_token(BEGIN)
        return self._can_write_calls


def read_arguments(arguments: str) -> Json:
    """Return the arguments of an earlier call. Raises ValueError unless they are a JSON object."""
    values = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(values, dict):
        raise ValueError
    return values


def _openai(message: Json) -> Json:
    """Return a message as templates expect it, the arguments of calls as objects."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _plain(messages: Sequence[Json], tools: Sequence[Json] | None) -> list[Json]:
    """Return the messages without tools, for a template that does not know them."""
    plain: list[Json] = []
    is_returned = False
    for message in messages:
        role, content = message["role"], message["content"]
        was_returned, is_returned = is_returned, role == "tool"
        if is_returned:
            content = f"{RETURNED}{content}{RETURNED_END}"
            if was_returned:
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": "user", "content": content})
            continue
        texts = [content] if content else []
        texts += [_written(call) for call in message.get("tool_calls", ())]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        plain.append({**kept, "content": "\n".join(texts)})
    return _with_description(plain, tools) if tools else plain


def _with_description(messages: list[Json], tools: Sequence[Json]) -> list[Json]:
    """Return the messages with a description of the tools in their first system message."""
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = "\n\n".join(
        [
            "These functions may be called, where they help to answer:",
            "\n".join(functions),
            "A call is written as",
            EXAMPLE,
            "and its result then comes between <tool_response> and </tool_response>.",
        ]
    )
    if messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _written(call: Json) -> str:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return f"{BEGIN}{BEFORE_NAME}{call['name']}{BEFORE_ARGUMENTS}{arguments}{END}"
