"""Fields that ask for structured output: OpenAI's `response_format`, and vLLM's
`structured_outputs` with the `guided_*` of older clients."""

import json
from collections.abc import Callable
from typing import Any

from serve.openai.response_format import WhiteSpace, constraint_of, json_constraint
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
    white_space = _white_space(body) or WhiteSpace.of_server(json_whitespace)
    found = _constraint(place, given[place], white_space) if given else None
    if white_space.field and (found is None or found.kind != "json_schema"):
        fix = "it is about white space in JSON, and none is asked for"
        raise UserError(white_space.field, fix=fix)
    return found


def _white_space(body: CompletionSettings) -> WhiteSpace | None:
    """Return the white space in JSON that a body asks for, or None. Raises UserError if its fields
    ask for different ones."""
    options = body.structured_outputs or {}
    name = "whitespace_pattern"
    patterns = {
        f"structured_outputs.{name}": options.get(name),
        f"guided_{name}": body.guided_whitespace_pattern,
    }
    asked = [WhiteSpace(own, place) for place, own in patterns.items() if own is not None]
    if options.get("disable_any_whitespace"):
        asked.insert(0, WhiteSpace(None, "structured_outputs.disable_any_whitespace"))
    for other in asked[1:]:
        if other.pattern != asked[0].pattern:
            fix = f"{asked[0].field} is given too: leave one of them out"
            raise UserError(other.field, fix=fix)
    return asked[0] if asked else None


def constraint_field(body: CompletionSettings) -> str:
    """Return the name of the field in which a body asks for structured output."""
    return next(iter(_given(body)), "response_format")


def _constraint(place: str, value: Any, white_space: WhiteSpace) -> Constraint | None:
    """Return the constraint that the field `place` asks for."""
    if place == "response_format":
        return constraint_of(value, white_space)
    kind = place.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind == "json":
        return json_constraint(place, _schema(place, value), white_space)
    if kind == "json_object":
        return json_constraint(place, {"type": "object"}, white_space)
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
