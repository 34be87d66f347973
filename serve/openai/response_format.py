"""OpenAI's `response_format`, with vLLM's regular expressions beside it."""

import json
from typing import Any, NamedTuple

from serve.sampling_params import Constraint, JsonWhitespace
from stu.common.errors import UNSET, UserError

FLEXIBLE = r"\r?\n?[ \t]{0,32}"
"""White space between two tokens of JSON. It is bounded, or a model might write nothing else."""
OWN_KEYS = "whitespace_flexible", "whitespace_pattern"
"""Settings of white space that a schema may have in its `x-guidance`."""


class WhiteSpace(NamedTuple):
    """White space between two tokens of JSON."""

    pattern: str | None
    """Regular expression that it matches. None: there is none."""
    field: str = ""
    """Field of the body that asks for it. Empty: it is the server's, and a schema's own goes
    first."""

    @classmethod
    def of_server(cls, json_whitespace: JsonWhitespace) -> "WhiteSpace":
        """Return that of a setting of `stu-serve`."""
        return cls(FLEXIBLE if json_whitespace == "flexible" else None)


FIELDS = {
    "text": {"type"},
    "json_object": {"type", "schema"},
    "json_schema": {"type", "json_schema"},
    "regex": {"type", "regex"},
}
"""Fields of a `response_format`, by its type."""


def constraint_of(response_format: dict[str, Any], white_space: WhiteSpace) -> Constraint | None:
    """Return the constraint that a `response_format` asks for, None for plain text.

    It may be `{"type": "text"}`, `{"type": "json_object"}` with or without a `schema`,
    `{"type": "json_schema", "json_schema": {"name": .., "schema": {..}}}`, or
    `{"type": "regex", "regex": ".."}`.

    Raises UserError for anything else; `Grammars.check` tells whether a schema is supported.
    """
    kind = response_format.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise UserError("response_format.type", kind, f"one of {', '.join(FIELDS)}")
    _require_known("response_format", response_format, FIELDS[kind])
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        schema = {"type": "object"} if schema is None else schema
        return json_constraint("response_format.schema", schema, white_space)
    if kind == "json_schema":
        named = response_format.get("json_schema")
        if not isinstance(named, dict) or named.get("schema") is None:
            allowed = "an object with the field schema, which is a JSON schema"
            raise UserError("response_format.json_schema", named, allowed)
        known = {"name", "description", "schema", "strict"}
        _require_known("response_format.json_schema", named, known)
        return json_constraint("response_format.schema", named["schema"], white_space)
    expression = response_format.get("regex")
    if not isinstance(expression, str):
        raise UserError("response_format.regex", expression, "a string")
    return Constraint("regex", expression)


def json_constraint(place: str, schema: Any, white_space: WhiteSpace) -> Constraint:
    """Return the constraint to JSON of a schema.

    Raises UserError about the field `place` for what is no schema, and for white space that the
    body asks for beside a schema's own.
    """
    if not isinstance(schema, dict | bool):
        raise UserError(place, schema, "an object, or true or false")
    own = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
    stated = [key for key in OWN_KEYS if isinstance(own, dict) and key in own]
    if stated and white_space.field:
        fix = f"the schema has {stated[0]} in its x-guidance: leave one of them out"
        raise UserError(white_space.field, UNSET, fix=fix)
    if white_space.pattern is not None and not stated and isinstance(own, dict):
        schema = {"anyOf": [schema]} if isinstance(schema, bool) else schema
        schema = {**schema, "x-guidance": {**own, "whitespace_pattern": white_space.pattern}}
    return Constraint("json_schema", json.dumps(schema))


def _require_known(place: str, values: dict[str, Any], known: set[str]) -> None:
    for name in values:
        if name not in known:
            fix = f"there is no such field here, use {', '.join(sorted(known))}"
            raise UserError(f"{place}.{name}", UNSET, fix=fix)
