"""Fields that ask for structured output: OpenAI's `response_format`, and vLLM's
`structured_outputs` with the `guided_*` of older clients."""

import json
from collections.abc import Callable
from typing import Any

from serve.openai.response_format import constraint_of, json_constraint
from serve.openai.schemas import CompletionSettings
from serve.sampling_params import Constraint, JsonWhitespace
from stu.common.errors import UNSET, UserError

OPTIONS: dict[str, type] = {
    "whitespace_pattern": str,
    "disable_any_whitespace": bool,
    "disable_additional_properties": bool,
    "disable_fallback": bool,
}
"""Fields of `structured_outputs` that are no constraint. The last two change nothing: objects have
only the properties that their schema lists, and there is one backend."""


def structured_constraint(
    body: CompletionSettings, json_whitespace: JsonWhitespace
) -> Constraint | None:
    """Return the constraint that a body asks for, or None.

    Raises UserError for one that is malformed, and for several;
    `serve.sampling.grammar.Grammars.check` tells whether it can be followed.
    """
    given = _given(body)
    place, *others = given or ["response_format"]
    if others:
        raise UserError(others[0], UNSET, fix=f"{place} is given too: leave one of them out")
    options = body.structured_outputs or {}
    option, pattern = "structured_outputs.whitespace_pattern", options.get("whitespace_pattern")
    if pattern is None:
        option, pattern = "guided_whitespace_pattern", body.guided_whitespace_pattern
    if options.get("disable_any_whitespace"):
        option, pattern = "structured_outputs.disable_any_whitespace", None
        json_whitespace = "compact"
    elif pattern is None:
        option = ""
    found = None if not given else _constraint(place, given[place], json_whitespace, pattern)
    if option and (found is None or found.kind != "json_schema"):
        raise UserError(option, fix="it is about white space in JSON, and none is asked for")
    return found


def constraint_field(body: CompletionSettings) -> str:
    """Return the name of the field in which a body asks for structured output."""
    return next(iter(_given(body)), "response_format")


def _constraint(
    place: str, value: Any, json_whitespace: JsonWhitespace, pattern: str | None
) -> Constraint | None:
    """Return the constraint that the field `place` asks for."""
    if place == "response_format":
        return constraint_of(value, json_whitespace, pattern)
    kind = place.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind == "json":
        return json_constraint(place, _schema(place, value), json_whitespace, pattern)
    if kind == "json_object":
        return json_constraint(place, {"type": "object"}, json_whitespace, pattern)
    return CONSTRAINTS[kind](place, value)


def _given(body: CompletionSettings) -> dict[str, Any]:
    """Return the constraints of a body by the names of their fields."""
    given: dict[str, Any] = {}
    if body.response_format is not None and body.response_format != {"type": "text"}:
        given["response_format"] = body.response_format
    for name, value in (body.structured_outputs or {}).items():
        place = f"structured_outputs.{name}"
        if value is None:
            continue
        if name in OPTIONS:
            if not isinstance(value, OPTIONS[name]):
                allowed = "a string" if OPTIONS[name] is str else "true or false"
                raise UserError(place, value, allowed)
        elif name == "json_object":
            if not isinstance(value, bool):
                raise UserError(place, value, "true or false")
            if value:
                given[place] = value
        elif name == "json" or name in CONSTRAINTS:
            given[place] = value
        else:
            known = ", ".join(["json", "json_object", *CONSTRAINTS, *OPTIONS])
            raise UserError(place, UNSET, fix=f"there is no such field here, use {known}")
    guided = ("json", "regex", "choice", "grammar")
    values = {f"guided_{name}": getattr(body, f"guided_{name}") for name in guided}
    return given | {place: value for place, value in values.items() if value is not None}


def _schema(place: str, value: Any) -> Any:
    """Return a schema, which may be JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(place, value, f"a JSON schema: {error}") from error


def _text_constraint(place: str, value: Any) -> Constraint:
    if not isinstance(value, str):
        raise UserError(place, value, "a string")
    is_regex = place.endswith("regex")
    return Constraint("regex" if is_regex else "grammar", value)


def _choice(place: str, value: Any) -> Constraint:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(place, value, "a list of strings, at least one")
    return Constraint("choice", json.dumps(value))


CONSTRAINTS: dict[str, Callable[[str, Any], Constraint]] = {
    "regex": _text_constraint,
    "choice": _choice,
    "grammar": _text_constraint,
}
"""Functions of a field's name and value, by the kind of the constraint."""
