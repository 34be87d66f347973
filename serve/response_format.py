"""OpenAI's `response_format`, and a regular expression beside it."""

import json
from typing import Any

from serve.grammar import Constraint
from serve.prompts import show


def constraint_of(response_format: Any) -> Constraint | None:
    """`{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema", "json_schema":
    {"name": .., "schema": {..}}}`, or `{"type": "regex", "regex": ".."}`.

    Raises ValueError for anything else; whether a schema can be followed is found out later.
    """
    allowed = {
        "text": {"type"},
        "json_object": {"type"},
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
        return Constraint("json_schema", '{"type": "object"}')
    if kind == "json_schema":
        return _schema(response_format.get("json_schema"))
    expression = response_format.get("regex")
    if not isinstance(expression, str):
        raise ValueError(
            f"response_format.regex={show(expression)} is not allowed: it must be a string"
        )
    return Constraint("regex", expression)


def _schema(given: Any) -> Constraint:
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise ValueError(
            f"response_format.json_schema={show(given)} is not allowed: it must be an object with "
            "the field schema, a JSON schema"
        )
    for key in given:
        if key not in ("name", "description", "schema", "strict"):
            raise ValueError(
                f"response_format.json_schema has the unknown field {show(key)}: leave it out"
            )
    return Constraint("json_schema", json.dumps(schema))
