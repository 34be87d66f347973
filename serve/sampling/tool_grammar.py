"""Grammars of answers that may call tools, in the form of Hermes and Qwen:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

The arguments follow the schema of the tool's parameters. Before the first call there may be text,
unless a call is required; after a call, another one, or nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.sampling.json_schema import prepare, target
from serve.sampling.schema_rewrites import Schema
from serve.sampling_params import Constraint
from stu.common.errors import UserError

BEGIN, END = "<tool_call>", "}\n</tool_call>"
BEFORE_NAME, BEFORE_ARGUMENTS = '\n{"name": "', '", "arguments": '
BETWEEN = "\n"
SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space in arguments: that of Python's JSON, in which templates write earlier calls."""
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
OF_TYPES = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
"""Keywords that decide which types of values a schema allows."""
MOST_STEPS = 50
"""Limit of schemas within one another that are read to find the type of arguments."""


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
    tools = [vars(tool) for tool in answers.tools]
    return Constraint("tools", json.dumps({**vars(answers), "tools": tools}))


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
        lines.append(f"text: %json {json.dumps(prepared_text(values['text']))}")
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


def text_of(source: str) -> Schema | None:
    """Return the prepared schema of a constraint's answers without calls, or None for any text."""
    text = json.loads(source)["text"]
    return None if text is None else prepared_text(text)


def may_follow_text(source: str) -> bool:
    """Return whether a constraint allows calls after text, which is then any text."""
    return json.loads(source)["text"] is None


def allows_only_objects(parameters: Schema) -> bool:
    """Return whether all values of a schema are objects, as arguments are. A schema that says
    nothing about types is taken for one of objects."""
    return not _says_types(parameters) or _allows_only_objects(parameters, parameters, {}, 0)


def _says_types(schema: Mapping[str, Any]) -> bool:
    return any(schema.get(key) is not None for key in OF_TYPES)


def _allows_only_objects(schema: Any, root: Schema, known: dict[int, bool], depth: int) -> bool:
    if not isinstance(schema, dict) or depth > MOST_STEPS:
        return False
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = False  # for schemas that lead to themselves

    def of_listed(key: str) -> list[bool]:
        listed = schema.get(key)
        inner = listed if isinstance(listed, list) else []
        return [_allows_only_objects(one, root, known, depth + 1) for one in inner]

    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    found = False
    if schema.get("type") is not None:
        found = schema["type"] in ("object", ["object"])
    elif isinstance(values, list):
        found = all(isinstance(value, dict) for value in values)
    elif "$ref" in schema:
        found = _allows_only_objects(target(schema["$ref"], root), root, known, depth + 1)
    known[id(schema)] = (
        found
        or any(of_listed("allOf"))
        or any(branches and all(branches) for branches in map(of_listed, ("anyOf", "oneOf")))
    )
    return known[id(schema)]


def prepared_text(schema: Any) -> Schema:
    """Return the schema of an answer without calls as llguidance can follow it. As without tools,
    there is no white space unless the schema's `x-guidance` allows it. Raises UserError."""
    schema = {"anyOf": [schema]} if isinstance(schema, bool) else dict(schema)
    own = schema.get("x-guidance", {})
    if isinstance(own, dict):
        schema["x-guidance"] = {"whitespace_flexible": False, **own}
    try:
        return prepare(schema)
    except RecursionError as error:
        raise UserError("json_schema", fix="it is nested too deeply") from error


def prepared_parameters(tool: CallableTool) -> Schema:
    """Return the schema of a tool's arguments as llguidance can follow it. Raises UserError."""
    schema: Schema = json.loads(json.dumps(tool.parameters or NO_ARGUMENTS))
    if schema.get("properties") == {}:  # generators of schemas write so for no arguments
        schema = {**NO_ARGUMENTS, **schema}
    if not _says_types(schema):
        schema["type"] = "object"
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
