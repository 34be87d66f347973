"""Grammars of answers that may call tools, in the form of Hermes and Qwen:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

The arguments follow the schema of the tool's parameters. Before the first call there may be text,
unless a call is required; after a call, another one, or nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve.sampling.json_schema import prepare
from serve.sampling.schema_rewrites import Schema
from serve.sampling_params import Constraint
from stu.common.errors import UserError

BEGIN, END = "<tool_call>", "}\n</tool_call>"
BEFORE_NAME, BEFORE_ARGUMENTS = '\n{"name": "', '", "arguments": '
BETWEEN = "\n"
SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space in arguments: that of Python's JSON, in which templates write earlier calls."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallableTool:
    """A tool that an answer may call."""

    name: str
    parameters: Mapping[str, Any] | None
    """Schema of its arguments. None: it has none."""
    is_strict: bool
    """Whether keywords of the schema that cannot be followed are refused and not ignored."""


@dataclass(frozen=True)
class ToolAnswers:
    """Answers that a grammar allows."""

    tools: Sequence[CallableTool]
    must_call: bool
    """Whether the answer is calls, and no text."""
    calls_several: bool
    text: Mapping[str, Any] | None = None
    """Schema of an answer without calls. None: any text."""


def tool_constraint(answers: ToolAnswers) -> Constraint:
    """Return the constraint to such answers."""
    return Constraint("tools", json.dumps(asdict(answers)))


def tool_grammar(source: str) -> str:
    """Return the grammar of a constraint in llguidance's variant of Lark.

    Raises UserError that names the tool for parameters that cannot be followed.
    """
    values = json.loads(source)
    tools = [CallableTool(**tool) for tool in values["tools"]]
    several = f" ({_text(BETWEEN + BEGIN)} call)*" if values["calls_several"] else ""
    calls = f"call{several}"
    lines = ["%llguidance {}"]
    if values["must_call"]:
        lines.append(f"start: {_text(BEGIN)} {calls}")
    elif values["text"] is not None:
        lines.append(f"start: text | {_text(BEGIN)} {calls}")
        lines.append(f"text: %json {json.dumps(prepare(values['text']))}")
    else:
        # The lexeme `begin` ends with the first mark, so TEXT never has one.
        lines.append(f"start: TEXT | begin {calls}")
        lines.append(f"begin[lazy]: TEXT {_text(BEGIN)}")
        lines.append(r"TEXT: /(.|\n)*/")
    lines.append(f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}")
    for index, tool in enumerate(tools):
        before = _text(f"{BEFORE_NAME}{tool.name}{BEFORE_ARGUMENTS}")
        schema = json.dumps(prepared_parameters(tool))
        lines.append(f"call_{index}: {before} arguments_{index} {_text(END)}")
        lines.append(f"arguments_{index}: %json {schema}")
    return "\n".join(lines)


def schemas_of(source: str) -> list[tuple[str, Schema]]:
    """Return the name and the prepared schema of each tool of a constraint."""
    tools = [CallableTool(**tool) for tool in json.loads(source)["tools"]]
    return [(tool.name, prepared_parameters(tool)) for tool in tools]


def may_follow_text(source: str) -> bool:
    """Return whether a constraint allows calls after text, which is then any text."""
    return json.loads(source)["text"] is None


def prepared_parameters(tool: CallableTool) -> Schema:
    """Return the schema of a tool's arguments as llguidance can follow it. Raises UserError."""
    schema: Schema = json.loads(json.dumps(tool.parameters or NO_ARGUMENTS))
    if schema.get("properties") == {}:  # generators of schemas write so for no arguments
        schema = {**NO_ARGUMENTS, **schema}
    own = schema.get("x-guidance", {})
    if isinstance(own, dict):
        is_flexible = own.keys() & {"whitespace_flexible", "whitespace_pattern"}
        common = {"whitespace_flexible": False} if is_flexible else SEPARATORS
        schema["x-guidance"] = {"lenient": not tool.is_strict, **common, **own}
    try:
        return prepare(schema)
    except UserError as error:
        raise wrong_parameters(tool.name, str(error)) from error
    except RecursionError as error:
        raise wrong_parameters(tool.name, "they are nested too deeply") from error


def wrong_parameters(name: str, reason: str) -> UserError:
    """Return the error for the parameters of a tool."""
    reason = reason.removeprefix("json_schema is not allowed: ")[:500]
    return UserError("tools", message=f"the parameters of the tool {json.dumps(name)}: {reason}")


def _text(text: str) -> str:
    """Return a string of the grammar."""
    return json.dumps(text)
