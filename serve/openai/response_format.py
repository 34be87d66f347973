"""OpenAI's `response_format`, and a regular expression beside it."""

import json
from typing import Any

from serve.sampling_params import Constraint, JsonWhitespace
from stu.common.errors import show

FLEXIBLE = r"\r?\n?[ \t]{0,32}"
"""White space between two tokens of JSON: not without end, or a model might write nothing else."""


def constraint_of(
    response_format: Any, json_whitespace: JsonWhitespace = "compact"
) -> Constraint | None:
    """Return the constraint of `{"type": "text"}` (None), `{"type": "json_object"}`, which may have
    a `schema`, `{"type": "json_schema", "json_schema": {"name": .., "schema": {..}}}`, or `{"type":
    "regex", "regex": ".."}`.

    Raises ValueError for anything else; whether a schema can be followed is found out later.
    """
    allowed = {
        "text": {"type"},
        "json_object": {"type", "schema"},
        "json_schema": {"type", "json_schema"},
        "regex": {"type", "regex"},
    }
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if not isinstance(kind, str) or kind not in allowed:
        raise ValueError(
            f"response_format={show(response_format)} is not allowed: its type must be one of "
            f"{', '.join(allowed)}"
        )
    for key in response_format:
        if key not in allowed[kind]:
            raise ValueError(
                f"response_format has the field {show(key)}, which goes not with type {kind}: "
                "leave it out"
            )
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return _constraint({"type": "object"} if schema is None else schema, json_whitespace)
    if kind == "json_schema":
        return _constraint(_schema(response_format.get("json_schema")), json_whitespace)
    expression = response_format.get("regex")
    if not isinstance(expression, str):
        raise ValueError(
            f"response_format.regex={show(expression)} is not allowed: it must be a string"
        )
    return Constraint("regex", expression)


def _schema(given: Any) -> Any:
    if not isinstance(given, dict) or given.get("schema") is None:
        raise ValueError(
            f"response_format.json_schema={show(given)} is not allowed: it must be an object with "
            "the field schema, a JSON schema"
        )
    for key in given:
        if key not in ("name", "description", "schema", "strict"):
            raise ValueError(
                f"response_format.json_schema has the unknown field {show(key)}: leave it out"
            )
    return given["schema"]


def _constraint(schema: Any, json_whitespace: JsonWhitespace) -> Constraint:
    if not isinstance(schema, dict | bool):
        raise ValueError(
            f"response_format has the schema {show(schema)}, which is not allowed: it must be an "
            "object, or true or false"
        )
    if json_whitespace == "flexible":
        schema = {"anyOf": [schema]} if isinstance(schema, bool) else schema
        own = schema.get("x-guidance", {})
        if isinstance(own, dict) and not own.keys() & {"whitespace_flexible", "whitespace_pattern"}:
            schema = {**schema, "x-guidance": {**own, "whitespace_pattern": FLEXIBLE}}
    return Constraint("json_schema", json.dumps(schema))
