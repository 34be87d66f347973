"""Error bodies in OpenAI's format, and pydantic's errors as UserError."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from stu.common.errors import UNSET, UserError

MOST_CHARACTERS = 1000
"""Longest message in characters: it may quote what a client sent."""

_ALLOWED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "an object",
    "string_type": "a string",
    "too_long": "a list or an object of at most {max_length} elements",
    "too_short": "a list of at least {min_length} element",
}
"""Allowed values, by pydantic's type of an error."""
_ALLOWED_UNIONS = {
    "content": "a string or a list of text parts",
    "output": "a string or a list of text parts",
    "input": "a string, a list of token ids (whole numbers >= 0), or a list of such inputs",
    "text_1": "a string, a list of token ids (whole numbers >= 0), or a list of such texts",
    "text_2": "a string, a list of token ids (whole numbers >= 0), or a list of such texts",
    "prompt": "a string, a list of token ids (whole numbers >= 0), or a list of such prompts",
    "stop": "a string or a list of strings",
    "tool_choice": "a string or an object",
}
"""Allowed values of fields with several types, where pydantic reports an error for each type."""
_PARTS = {"list[Part]", "list[TextPart]"}
"""Pydantic's names for the second type of a content."""


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of an error; long texts are shortened in the middle."""
    message, param = _shortened(message), param and _shortened(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def user_error_body(error: UserError) -> dict[str, Any]:
    """Return the body of an error that the client can mend."""
    return error_body(str(error), "invalid_request_error", error.field or None, error.code)


def located(error: UserError) -> PydanticCustomError:
    """Return an error for a validator to raise, which pydantic adds the place to."""
    return PydanticCustomError("user_error", "{error}", {"error": error})


def body_error(errors: Sequence[Mapping[str, Any]]) -> UserError:
    """Return the first of the errors that pydantic found in a body as a UserError, or that of a
    part: a list of parts is not meant as a string."""
    of_part = next((error for error in errors if not _PARTS.isdisjoint(error["loc"][:-1])), None)
    first = of_part or errors[0]
    kind, location, context = first["type"], [str(part) for part in first["loc"]], first.get("ctx")
    if of_part:
        location = [part for part in location if part not in _PARTS]
    place = ".".join(location)
    if kind == "user_error" and context is not None:
        error: UserError = context["error"]
        return error.renamed(".".join([*location, error.field]) if error.field else place)
    if kind == "missing":
        return UserError(place, message=f"field {json.dumps(place)} is missing")
    allowed = _ALLOWED.get(kind, "").format(**context or {})
    for depth, part in enumerate(() if of_part else location[:-1], 1):
        if part in _ALLOWED_UNIONS:
            place, allowed = ".".join(location[:depth]), _ALLOWED_UNIONS[part]
    if not allowed:
        return UserError(place, message=f"{place} is not allowed: {first['msg']}")
    value = first["input"]
    return UserError(place, UNSET if isinstance(value, list | dict) else value, allowed)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [..] {text[-half:]}"
